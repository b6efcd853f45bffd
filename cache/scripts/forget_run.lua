-- Take a run off the list of active ones, unless it is active (again).
-- KEYS 1 head hash, 2 active set
-- ARGV 1 name
-- Returns 1 if it is off the list, 0 if it is active.
local status = redis.call('HGET', KEYS[1], 'status')
if status == 'pending' or status == 'running' then
  return 0
end
redis.call('SREM', KEYS[2], ARGV[1])
return 1
