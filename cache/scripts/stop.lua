-- Record that a run ends with its present version, before its last step: the verdict of one of its rules.
-- KEYS 1 head hash, 2 events stream
-- ARGV 1 token, 2 version, 3 JSON of the verdict (version, rule, reason), 4 TTL of a run (s), 5 events kept
-- Returns 'ok' (also where that is recorded already), 'fenced', 'stale' (the head is at another version), or
-- the status of a run that is not running.
if tonumber(redis.call('HGET', KEYS[1], 'token') or '-1') ~= tonumber(ARGV[1]) then
  return 'fenced'
end
if redis.call('HGET', KEYS[1], 'version') ~= ARGV[2] then
  return 'stale'
end
if redis.call('HEXISTS', KEYS[1], 'stopped') == 1 then
  return 'ok'
end
local status = redis.call('HGET', KEYS[1], 'status')
if status ~= 'running' then
  return status
end
redis.call('HSET', KEYS[1], 'stopped', ARGV[3], 'total_steps', ARGV[2])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[5], '*', 'type', 'stopped', 'data', ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[4])
return 'ok'
