-- Record the metrics of one version once, and let go of what the evaluation held.
-- KEYS 1 evaluations hash, 2 parts hash, 3 pins hash, 4 events stream, 5 pending hash (version -> parts)
-- ARGV 1 version, 2 metrics JSON, 3 event JSON, 4 TTL of a run (s), 5 events kept
-- Returns 1 if this call recorded it, else 0.
local first = redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('DEL', KEYS[2])
redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('HDEL', KEYS[5], ARGV[1])
if first == 1 then
  redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[5], '*', 'type', 'evaluation', 'data', ARGV[3])
  redis.call('EXPIRE', KEYS[4], ARGV[4])
end
return first
