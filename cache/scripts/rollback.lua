-- Take the head back to a version whose optimizer state is at hand, to replay from there.
-- What the replay must meet again is kept in `expected`; not so if the code was corrected since that
-- version, or if workers of any environment are admitted: then the corrected code (or whatever
-- computes now) holds from that version on, as another revision of the run, to which neither slots nor
-- parameters that a worker holds of the steps before belong.
-- KEYS 1 head hash, 2 ledger hash, 3 expected hash, 4 versions hash, 5 events stream,
--      6... slots and leases hashes of the steps that may be under way
-- ARGV 1 token, 2 version to go back to, 3 its chain, 4 TTL of a run (s), 5 events kept
-- Returns {'ok', versions whose records were dropped...} or {'fenced'}.
if tonumber(redis.call('HGET', KEYS[1], 'token') or '-1') ~= tonumber(ARGV[1]) then
  return {'fenced'}
end
local target = tonumber(ARGV[2])
local from = tonumber(redis.call('HGET', KEYS[1], 'version'))
local corrected = tonumber(redis.call('HGET', KEYS[1], 'corrected_at') or '-1')
local anew = from > target and (target < corrected or redis.call('HGET', KEYS[1], 'skew') == 'admit')
for _, field in ipairs(redis.call('HKEYS', KEYS[2])) do  -- whatever the head says, no more than there are
  local version = tonumber(field)
  if version and version > target and version <= from then
    redis.call('HSET', KEYS[3], field, cjson.decode(redis.call('HGET', KEYS[2], field))['chain'])
    redis.call('HDEL', KEYS[2], field)
  end
end
redis.call('EXPIRE', KEYS[3], ARGV[4])
if anew then
  redis.call('DEL', KEYS[3])
  for i = 6, #KEYS do
    redis.call('DEL', KEYS[i])
  end
  local before, switches = string.match(redis.call('HGET', KEYS[1], 'incarnation'), '^([^+]*)(.*)$')
  local name, number = string.match(before, '^([^.]*)%.?(%d*)$')
  redis.call('HSET', KEYS[1], 'corrected_at', math.min(target, corrected),
    'incarnation', name .. '.' .. string.format('%d', (tonumber(number) or 0) + 1) .. switches)
end
redis.call('HSET', KEYS[1], 'version', ARGV[2], 'chain', ARGV[3])
redis.call('HDEL', KEYS[1], 'launched', 'called', 'round')
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
