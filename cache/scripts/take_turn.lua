-- A participant of a round: reports the version that it has made, writes the slot that it has computed, and
-- asks what is next. Any of the three may be sent twice.
-- KEYS 1 head hash, 2 round hash, 3 slots and 4 leases of the step, 5 ledger hash, 6 expected hash,
--      7 events stream, 8 slots and 9 leases of the step before, 10 slots of a step that nobody reads any more,
--      11 versions hash
-- ARGV 1 step: the version that the participant holds, 2 token of the round, 3 worker, 4 worker key prefix,
--      5 wake key prefix, 6 memory that the worker shares with its host ('' for none), 7 slots of the step (0:
--      it is beyond the round), 8 TTL of the work (s), 9 tries of a shard at most,
--      10 seconds after which a live holder's shard is computed once more ('' for never), 11 revision of the run,
--      12 shard whose slot is written ('' for none), 13 slot JSON, 14 its nonce, 15 its digest,
--      16 digest of the parameters of version ARGV 1, if it was made here ('' else), 17 its chain,
--      18 ledger entry JSON, 19 event JSON, 20 slots of the step before, 21 now (s), 22 events kept,
--      23 TTL of a run (s), 24 TTL of a wake (s), 25 first step of the round
-- Returns {verdict, verdict on the slot, verdict on the report, ...}. Verdicts: 'compute' with shard, attempt and
-- memory (the participants' common one, '' if there is none); 'wait' (live workers are at what is missing);
-- 'complete' with the step's slots; 'end' (the round is over, or is to be: publish); 'behind' (others
-- went on, and what they went on with is gone, or the round's last version is stored); 'divergent' with the
-- worker that made other bytes of this version first; 'diverged' (a replay that did not meet its chain); 'fenced';
-- 'stopped'.
-- On the slot: as write_slot.lua. On the report: 'first' (it is the commit), 'same', ''.
local head = redis.call('HMGET', KEYS[1], 'status', 'version', 'token', 'incarnation', 'round')
local round = redis.call('HMGET', KEYS[2], 'token', 'memory', 'waiting', 'ending', 'published', 'first')
local step, version = tonumber(ARGV[1]), tonumber(head[2] or '-1')
if head[3] ~= ARGV[2] or round[1] ~= ARGV[2] or round[6] ~= ARGV[25]
    or string.match(head[4] or '', '^[^+]*') ~= ARGV[11] then
  return {'fenced', '', ''}
end
if not head[5] or step > version + (ARGV[16] == '' and 0 or 1) then  -- rolled back
  return {'fenced', '', ''}
end
if head[1] ~= 'running' and head[1] ~= 'paused' then
  return {'stopped', '', ''}
end
if redis.call('HSETNX', KEYS[2], 'p:' .. ARGV[3], ARGV[6]) == 1 then
  if not round[2] then
    round[2] = ARGV[6]
  elseif round[2] ~= ARGV[6] then
    round[2] = ''
  end
  redis.call('HSET', KEYS[2], 'memory', round[2])
end

local reported = ''
if ARGV[16] ~= '' then
  if version == step - 1 then
    if round[5] == head[2] or redis.call('HLEN', KEYS[8]) ~= tonumber(ARGV[20]) then
      return {'behind', '', ''}
    end
    local expected = redis.call('HGET', KEYS[6], ARGV[1])
    if expected and expected ~= ARGV[17] then
      return {'diverged', '', ''}
    end
    redis.call('HDEL', KEYS[6], ARGV[1])
    redis.call('HSET', KEYS[5], ARGV[1], ARGV[18])
    redis.call('HSET', KEYS[1], 'version', ARGV[1], 'chain', ARGV[17], 'committed_at', ARGV[21])
    redis.call('HSET', KEYS[2], 'd' .. ARGV[1], ARGV[16], 'w' .. ARGV[1], ARGV[3])
    local old = string.format('%d', step - 16)
    redis.call('HDEL', KEYS[2], 'd' .. old, 'w' .. old)
    redis.call('DEL', KEYS[9], KEYS[10])
    redis.call('XADD', KEYS[7], 'MAXLEN', '~', ARGV[22], '*', 'type', 'step', 'data', ARGV[19])
    redis.call('EXPIRE', KEYS[5], ARGV[23])
    redis.call('EXPIRE', KEYS[7], ARGV[23])
    version, reported = step, 'first'
  else
    local seen = redis.call('HMGET', KEYS[2], 'd' .. ARGV[1], 'w' .. ARGV[1])
    if seen[1] and seen[1] ~= ARGV[16] then
      if redis.call('HSETNX', KEYS[2], 'disputed', ARGV[1]) == 1 then
        redis.call('HSET', KEYS[2], 'ending', 'disputed', 'other', ARGV[3] .. ' ' .. ARGV[16])
      end
      if round[5] then  -- it may be made of the wrong bytes
        redis.call('HDEL', KEYS[11], round[5])
        redis.call('HDEL', KEYS[2], 'published')
      end
      return {'divergent', '', '', seen[2]}
    end
    reported = 'same'
  end
end

local shards = tonumber(ARGV[7])
local written = ''
if ARGV[12] ~= '' then
  if step < version then
    redis.call('HINCRBY', KEYS[1], 'late', 1)
    written = 'late'
  elseif redis.call('HSETNX', KEYS[3], ARGV[12], ARGV[13]) == 1 then
    redis.call('EXPIRE', KEYS[3], ARGV[8])
    written = 'written'
  else
    local there = cjson.decode(redis.call('HGET', KEYS[3], ARGV[12]))
    written = 'written'
    if there['nonce'] ~= ARGV[14] then
      redis.call('HINCRBY', KEYS[1], 'duplicates', 1)
      written = 'duplicate'
      if there['digest'] ~= ARGV[15] then
        redis.call('HINCRBY', KEYS[1], 'divergent', 1)
        written = 'divergent'
      end
    end
  end
end

if round[4] == 'disputed' then
  return {'behind', written, reported}
end
if shards == 0 or ((head[1] == 'paused' or round[4] or round[5] == ARGV[1]) and version == step) then
  return {'end', written, reported}
end
local slots = redis.call('HGETALL', KEYS[3])
if #slots >= 2 * shards then
  if round[3] and round[3] ~= '' then
    for worker in string.gmatch(round[3], '[^,]+') do
      redis.call('LPUSH', ARGV[5] .. worker, '1')
      redis.call('EXPIRE', ARGV[5] .. worker, ARGV[24])
    end
    redis.call('HSET', KEYS[2], 'waiting', '')
  end
  local reply = {'complete', written, reported}
  for i = 1, #slots do
    reply[#reply + 1] = slots[i]
  end
  return reply
end
if version > step then
  return {'behind', written, reported}
end
local present, leases, found = {}, {}, redis.call('HGETALL', KEYS[4])
for i = 1, #slots, 2 do
  present[slots[i]] = true
end
for i = 1, #found, 2 do
  leases[found[i]] = cjson.decode(found[i + 1])
end
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
local take, attempt, backups, oldest
for shard = 0, shards - 1 do
  local field = string.format('%d', shard)
  if not present[field] then
    local lease = leases[field]
    if not lease then
      take, attempt, backups = field, 1, nil
      break
    elseif not lease['open'] then
      take, attempt, backups = field, lease['attempt'] + 1, nil
      break
    elseif lease['worker'] == ARGV[3] then
      take, attempt, backups, oldest = field, lease['attempt'], lease['backups'], nil
      break
    elseif redis.call('EXISTS', ARGV[4] .. lease['worker']) == 0 then
      if lease['attempt'] < tonumber(ARGV[9]) then
        take, attempt, backups = field, lease['attempt'] + 1, nil
        break
      end
    elseif ARGV[10] ~= '' and now - lease['since'] > tonumber(ARGV[10]) and (lease['backups'] or 0) < 2
        and (not oldest or lease['since'] < oldest) then
      take, attempt, backups, oldest = field, lease['attempt'], (lease['backups'] or 0) + 1, lease['since']
    end
  end
end
if take then
  if oldest and backups then
    redis.call('HINCRBY', KEYS[1], 'backups', 1)
  end
  redis.call('HSET', KEYS[4], take, cjson.encode({worker = ARGV[3], attempt = attempt, delivery = 'round',
    open = true, since = now, backups = backups}))
  redis.call('EXPIRE', KEYS[4], ARGV[8])
  return {'compute', written, reported, take, attempt, round[2] or ''}
end
local waiting = round[3] or ''
if not string.find(',' .. waiting .. ',', ',' .. ARGV[3] .. ',', 1, true) then
  redis.call('HSET', KEYS[2], 'waiting', waiting .. ',' .. ARGV[3])
end
return {'wait', written, reported}
