-- A worker that has nothing else to do asks for a shard that is better computed once more, beside its holder:
-- one that its holder will need, or has taken already, far longer for than the asker would.
-- KEYS 1 head   hash  state of the run
--      2 slots  hash  shard -> finished slot, of this step (and beyond the shards, of its partial sums)
--      3 leases hash  shard -> {"worker","attempt","delivery","open","since","backups","asked"} of this step
-- ARGV 1 step, 2 shards in the step, 3 seconds that the asker takes for a shard, 4 how many times that a wait
--      must exceed, 5 and by how many seconds more, 6 most backups of a shard, 7 after how many seconds one that
--      was not begun is taken for lost, 8 worker key prefix, 9 name of the run, 10 how many shards may be
--      missing at most for each question to be answered; where more are, it is if their number is a power of
--      two (0: each is), 11 the slot that the asker has written and 12 its nonce: whoever was not the first
--      is told nothing ('' and '': the asker has written none)
-- Returns the shard, or -1 for none. While there are shards that nobody has begun yet, none is late. Of a
-- request sent twice the second is told nothing, and the shard waits for the time of ARGV 7.
-- Every Client asks with every slot that it writes: so the common cases are told apart by two lengths, and a
-- step of K shards in as many hands is looked through about log2(K) times, not K times.
-- What a holder needs is what it took for its last shards of the run (`pace` in its heartbeat), or as long as
-- the asker if that is not known.
if redis.call('HGET', KEYS[1], 'status') ~= 'running' then
  return -1
end
local shards = tonumber(ARGV[2])
local answered = tonumber(ARGV[10])
if answered > 0 and redis.call('HLEN', KEYS[3]) < shards then
  return -1  -- whoever is at a shard, or has written it, has its lease
end
if ARGV[11] ~= '' then
  local own = redis.call('HGET', KEYS[2], ARGV[11])
  if not own or cjson.decode(own)['nonce'] ~= ARGV[12] then
    return -1
  end
end
local written, missing = {}, shards
for _, slot in ipairs(redis.call('HKEYS', KEYS[2])) do
  if tonumber(slot) < shards then
    written[slot], missing = true, missing - 1
  end
end
if missing == 0 or (answered > 0 and missing > answered and math.frexp(missing) ~= 0.5) then
  return -1
end
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local mine = tonumber(ARGV[3])
local found, lease_of, worst = -1, nil, tonumber(ARGV[4]) * mine + tonumber(ARGV[5])
local waiting = missing
local leases = redis.call('HGETALL', KEYS[3])
for i = 1, #leases, 2 do
  local shard = leases[i]
  if tonumber(shard) < shards and not written[shard] then
    waiting = waiting - 1
    local lease = cjson.decode(leases[i + 1])
    local holder = lease['open'] and redis.call('GET', ARGV[8] .. lease['worker'])
    if holder and (lease['backups'] or 0) < tonumber(ARGV[6]) and now - (lease['asked'] or 0) > tonumber(ARGV[7]) then
      local pace = (cjson.decode(holder)['pace'] or {})[ARGV[9]] or mine
      local wait = math.abs(pace - (now - lease['since']))
      if wait > worst then
        found, lease_of, worst = shard, lease, wait
      end
    end
  end
end
if waiting > 0 then
  return -1
end
if lease_of then
  lease_of['backups'] = (lease_of['backups'] or 0) + 1
  lease_of['asked'] = now
  redis.call('HSET', KEYS[3], found, cjson.encode(lease_of))
  redis.call('HINCRBY', KEYS[1], 'backups', 1)
end
return tonumber(found)
