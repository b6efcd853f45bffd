-- A training server closes a round that is over, or that nobody is at any more; its steps can be launched again.
-- KEYS 1 head hash, 2 round hash, 3... slots hashes of steps that are committed
-- ARGV 1 token
-- Returns 'ok' or 'fenced'.
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then
  return 'fenced'
end
redis.call('HDEL', KEYS[1], 'round', 'launched', 'called')
for i = 2, #KEYS do
  redis.call('DEL', KEYS[i])
end
return 'ok'
