-- Uses entrusted.lua
-- Record the metrics of one version once, and let go of what the evaluation held.
-- KEYS 1 evaluations hash, 2 parts hash, 3 pins hash, 4 events stream, 5 pending hash (version -> parts),
--      6 head hash, 7 outbox hash, 8 set of the runs that have one
-- ARGV 1 version, 2 metrics JSON, 3 event JSON, 4 TTL of a run (s), 5 events kept, 6 name of the run,
--      7 id and 8 text of the entry for the outbox, 9 entries there at most, 10 event JSON where it is full
-- Returns 1 if this call recorded it, else 0.
local first = redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('DEL', KEYS[2])
redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('HDEL', KEYS[5], ARGV[1])
if first == 1 then
  redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[5], '*', 'type', 'evaluation', 'data', ARGV[3])
  redis.call('EXPIRE', KEYS[4], ARGV[4])
  entrusted(KEYS[6], KEYS[7], KEYS[8], KEYS[4], ARGV[6], 'evaluated', {ARGV[7], ARGV[8], ARGV[9], ARGV[10]},
    ARGV[4], ARGV[5])
end
return first
