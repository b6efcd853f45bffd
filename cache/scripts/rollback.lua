-- Take the head back to a version whose optimizer state is at hand, to replay from there.
-- What the replay must meet again is kept in `expected`.
-- KEYS 1 head hash, 2 ledger hash, 3 expected hash, 4 versions hash, 5 events stream
-- ARGV 1 token, 2 version to go back to, 3 its chain, 4 TTL of a run (s), 5 events kept
-- Returns {'ok', versions whose records were dropped...} or {'fenced'}.
if tonumber(redis.call('HGET', KEYS[1], 'token') or '-1') ~= tonumber(ARGV[1]) then
  return {'fenced'}
end
local target = tonumber(ARGV[2])
local from = tonumber(redis.call('HGET', KEYS[1], 'version'))
for version = target + 1, from do
  local field = tostring(version)
  local entry = redis.call('HGET', KEYS[2], field)
  if entry then
    redis.call('HSET', KEYS[3], field, cjson.decode(entry)['chain'])
    redis.call('HDEL', KEYS[2], field)
  end
end
redis.call('EXPIRE', KEYS[3], ARGV[4])
redis.call('HSET', KEYS[1], 'version', ARGV[2], 'chain', ARGV[3])
redis.call('HDEL', KEYS[1], 'launched', 'called')
if from > target then  -- not sent twice
  redis.call('HINCRBY', KEYS[1], 'replayed', from - target)
  redis.call('XADD', KEYS[5], 'MAXLEN', '~', ARGV[5], '*', 'type', 'rollback', 'data',
    cjson.encode({version = target, from = from}))
end
redis.call('EXPIRE', KEYS[5], ARGV[4])
local reply = {'ok'}
for _, kept in ipairs(redis.call('HKEYS', KEYS[4])) do
  if tonumber(kept) > target then
    reply[#reply + 1] = kept
  end
end
return reply
