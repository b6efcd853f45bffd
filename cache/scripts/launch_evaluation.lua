-- Record that a version is being evaluated, and keep it stored meanwhile.
-- KEYS 1 evaluations hash, 2 pending hash (version -> parts), 3 pins hash
-- ARGV 1 version, 2 parts, 3 expiry of the pin (ms), 4 TTL of a run (s)
-- Returns 1 if this call launched it, 0 if it is recorded already or under way.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then
  return 0
end
local first = redis.call('HSETNX', KEYS[2], ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[4])
redis.call('HSET', KEYS[3], ARGV[1], ARGV[3])
redis.call('EXPIRE', KEYS[3], ARGV[4])
return first
