-- Record or replace a stored version. Its blobs are already stored.
-- KEYS 1 head hash, 2 versions hash
-- ARGV 1 token, 2 version, 3 record JSON, 4 TTL of a run (s)
-- Returns 'ok' or 'fenced': a server that was overtaken must not point a version at bytes of its own.
if tonumber(redis.call('HGET', KEYS[1], 'token') or '-1') ~= tonumber(ARGV[1]) then
  return 'fenced'
end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[4])
return 'ok'
