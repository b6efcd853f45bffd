-- The training server gives the run up: a standby may take it at once.
-- KEYS 1 head hash
-- ARGV 1 token
-- Returns 1 if the run was the caller's, else 0.
if tonumber(redis.call('HGET', KEYS[1], 'token') or '-1') ~= tonumber(ARGV[1]) then
  return 0
end
redis.call('HSET', KEYS[1], 'owner', '')
return 1
