-- A process says something of a run that the others are to agree with; the first to say it is heard.
-- KEYS 1 head hash, 2 claims hash what -> text
-- ARGV 1 what, 2 text, 3 TTL of a run (s)
-- Returns the claims in force, flat: what, text, what, text (this one alone, if the run is gone).
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {ARGV[1], ARGV[2]}
end
redis.call('HSETNX', KEYS[2], ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[3])
return redis.call('HGETALL', KEYS[2])
