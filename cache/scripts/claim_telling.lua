-- Take an entry of a run's outbox that is due, under a lease: whoever dies with it leaves it to the next.
-- KEYS 1 outbox hash (id -> entry), 2 telling hash (id -> JSON of how its delivery stands), 3 set of the runs that
--      have something to tell
-- ARGV 1 name of the run, 2 worker, 3 worker key prefix, 4 seconds of the lease, 5 nonce of the request, 6 TTL (s)
-- Returns {id, entry, tries, this one included}, or {} where nothing is due. A run with nothing left to be told
-- leaves the set.
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
local texts, found = {}, redis.call('HGETALL', KEYS[2])
for i = 1, #found, 2 do
  texts[found[i]] = found[i + 1]
end
local take, taken, first, left = nil, nil, nil, false
for _, id in ipairs(redis.call('HKEYS', KEYS[1])) do
  local read, standing = pcall(cjson.decode, texts[id] or '{}')
  if not read or type(standing) ~= 'table' then  -- nobody of ours wrote it: the entry begins anew
    standing = {}
  end
  if standing['nonce'] == ARGV[5] then  -- sent twice
    return {id, redis.call('HGET', KEYS[1], id), tostring(standing['tries'])}
  end
  if not standing['dead'] then
    left = true
    local due, holder = tonumber(standing['due']) or 0, standing['holder']
    if type(holder) == 'string' and redis.call('EXISTS', ARGV[3] .. holder) == 0 then
      due = 0
    end
    if due <= now and (not first or due < first) then
      take, taken, first = id, standing, due
    end
  end
end
if not left then
  redis.call('SREM', KEYS[3], ARGV[1])
end
if not take then
  return {}
end
local tries = math.floor(tonumber(taken['tries']) or 0) + 1
redis.call('HSET', KEYS[2], take, cjson.encode({tries = tries, due = now + tonumber(ARGV[4]), holder = ARGV[2],
  nonce = ARGV[5], error = type(taken['error']) == 'string' and taken['error'] or nil}))
redis.call('EXPIRE', KEYS[2], ARGV[6])
return {take, redis.call('HGET', KEYS[1], take), tostring(tries)}
