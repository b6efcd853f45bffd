-- Give an evaluation under way up: nobody can compute its version any more.
-- KEYS 1 pending hash (version -> parts), 2 parts hash, 3 pins hash, 4 events stream
-- ARGV 1 version, 2 event JSON, 3 TTL of a run (s), 4 events kept
-- Returns 1 if this call gave it up, 0 if it was not under way.
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then
  return 0
end
redis.call('DEL', KEYS[2])
redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[4], '*', 'type', 'evaluation lost', 'data', ARGV[2])
redis.call('EXPIRE', KEYS[4], ARGV[3])
return 1
