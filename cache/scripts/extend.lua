-- Let a run that is done go on under a config with more epochs: a training server restores its last version.
-- KEYS 1 spec string, 2 head hash, 3 events stream, 4 active set, 5... the run's other lasting keys
-- ARGV 1 name, 2 spec JSON, 3 incarnation that the caller read, 4 the next one, 5 TTL of a run (s),
--      6 event JSON, 7 events kept
-- Returns 'ok', 'changed' (it is another life or revision by now), 'stopped' (one of its rules ended it), or
-- the status of a run that is not done.
local status = redis.call('HGET', KEYS[2], 'status')
local incarnation = redis.call('HGET', KEYS[2], 'incarnation')
if status and incarnation == ARGV[4] then  -- sent twice
  return 'ok'
end
if status ~= 'done' then
  return status or 'missing'
end
if incarnation ~= ARGV[3] then
  return 'changed'
end
if redis.call('HEXISTS', KEYS[2], 'stopped') == 1 then
  return 'stopped'
end
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[5])
redis.call('HSET', KEYS[2], 'status', 'pending', 'incarnation', ARGV[4])
redis.call('HDEL', KEYS[2], 'total_steps', 'launched', 'called', 'round', 'started_at')
redis.call('SADD', KEYS[4], ARGV[1])
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[7], '*', 'type', 'extended', 'data', ARGV[6])
for index = 2, #KEYS do
  redis.call('EXPIRE', KEYS[index], ARGV[5])
end
return 'ok'
