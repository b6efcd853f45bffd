-- The training server records that the chord of the present step was published.
-- KEYS 1 head hash
-- ARGV 1 token, 2 step
-- Returns 'ok', 'fenced', or 'stale' (the head is at another step by now).
if tonumber(redis.call('HGET', KEYS[1], 'token') or '-1') ~= tonumber(ARGV[1]) then
  return 'fenced'
end
if tonumber(redis.call('HGET', KEYS[1], 'version')) ~= tonumber(ARGV[2]) then
  return 'stale'
end
redis.call('HSET', KEYS[1], 'launched', ARGV[2])
return 'ok'
