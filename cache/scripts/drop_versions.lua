-- Forget stored versions; the caller deletes their bytes afterwards.
-- KEYS 1 head hash, 2 versions hash
-- ARGV 1 token, 2... versions
-- Returns 'ok' or 'fenced': a server that was overtaken must not drop what its successor stored.
if tonumber(redis.call('HGET', KEYS[1], 'token') or '-1') ~= tonumber(ARGV[1]) then
  return 'fenced'
end
for i = 2, #ARGV do
  redis.call('HDEL', KEYS[2], ARGV[i])
end
return 'ok'
