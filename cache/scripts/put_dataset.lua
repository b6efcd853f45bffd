-- Name a stored dataset, or refuse to. Its chunks were stored before.
-- KEYS 1 hash  digest, record (JSON)
--      2 zset  all datasets: name -> time of the put (s)
-- ARGV 1 name, 2 digest, 3 record JSON, 4 TTL (s), 5 now (s), 6 '1' if other content may be replaced
-- Returns {verdict, record that was there or ''}: 'written', 'same' (this content had the name
-- already; record and TTL are new), 'exists' (other content has it; nothing was changed).
local digest = redis.call('HGET', KEYS[1], 'digest')
local before = redis.call('HGET', KEYS[1], 'record') or ''
if digest and digest ~= ARGV[2] and ARGV[6] ~= '1' then
  return {'exists', before}
end
redis.call('HSET', KEYS[1], 'digest', ARGV[2], 'record', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('ZADD', KEYS[2], ARGV[5], ARGV[1])
if redis.call('TTL', KEYS[2]) < tonumber(ARGV[4]) then
  redis.call('EXPIRE', KEYS[2], ARGV[4])
end
return {digest == ARGV[2] and 'same' or 'written', before}
