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
  local many = string.match(redis.call('HGET', KEYS[6], 'on') or '', ',evaluated=(%d),')
  for place = 0, tonumber(many or '0') - 1 do
    if redis.call('HLEN', KEYS[7]) < tonumber(ARGV[9]) then
      redis.call('HSET', KEYS[7], ARGV[7] .. '.' .. place, ARGV[8])
      redis.call('EXPIRE', KEYS[7], ARGV[4])
      redis.call('SADD', KEYS[8], ARGV[6])
      redis.call('EXPIRE', KEYS[8], ARGV[4])
    else
      redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[5], '*', 'type', 'not told', 'data', ARGV[10])
    end
  end
end
return first
