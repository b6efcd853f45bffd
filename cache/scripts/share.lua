-- Give a run another share of the fleet, from its next messages on.
-- KEYS 1 head hash, 2 events stream
-- ARGV 1 weight ('' to leave it), 2 priority ('' to leave it), 3 event JSON, 4 events kept, 5 TTL of a run (s)
-- Returns the run's status, or 'missing'.
local status = redis.call('HGET', KEYS[1], 'status')
if not status then
  return 'missing'
end
local before = redis.call('HMGET', KEYS[1], 'weight', 'priority')
if (ARGV[1] == '' or ARGV[1] == before[1]) and (ARGV[2] == '' or ARGV[2] == before[2]) then
  return status
end
if ARGV[1] ~= '' then
  redis.call('HSET', KEYS[1], 'weight', ARGV[1])
end
if ARGV[2] ~= '' then
  redis.call('HSET', KEYS[1], 'priority', ARGV[2])
end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[4], '*', 'type', 'share', 'data', ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[5])
return status
