-- Change the status of a run, if it is in one of the states that allow it.
-- KEYS 1 head hash, 2 active set, 3 events stream
-- ARGV 1 name, 2 new status, 3 allowed states (comma-separated, with a comma at both ends), 4 event type,
--      5 event JSON, 6 error JSON ('' to clear, '-' to leave), 7 TTL of a run (s), 8 events kept,
--      9 token ('' if the caller is not the training server)
-- Returns {'ok', old status}, {'fenced', status} or {'refused', present status}.
local status = redis.call('HGET', KEYS[1], 'status')
if not status then
  return {'refused', 'missing'}
end
if ARGV[9] ~= '' and redis.call('HGET', KEYS[1], 'token') ~= ARGV[9] then
  return {'fenced', status}
end
if not string.find(ARGV[3], ',' .. status .. ',', 1, true) then
  return {'refused', status}
end
redis.call('HSET', KEYS[1], 'status', ARGV[2])
if ARGV[6] == '' then
  redis.call('HDEL', KEYS[1], 'error')
elseif ARGV[6] ~= '-' then
  redis.call('HSET', KEYS[1], 'error', ARGV[6])
end
if ARGV[2] == 'running' or ARGV[2] == 'pending' then
  redis.call('HDEL', KEYS[1], 'launched')
  redis.call('SADD', KEYS[2], ARGV[1])
  redis.call('EXPIRE', KEYS[2], ARGV[7])
else
  redis.call('SREM', KEYS[2], ARGV[1])
end
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[8], '*', 'type', ARGV[4], 'data', ARGV[5])
redis.call('EXPIRE', KEYS[3], ARGV[7])
return {'ok', status}
