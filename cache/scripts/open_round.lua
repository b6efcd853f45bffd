-- A training server opens a round: steps that the Clients take by themselves, from the present one on.
-- KEYS 1 head hash, 2 round hash, 3... keys whose life is renewed
-- ARGV 1 token, 2 first step (the present one), 3 last step, 4 TTL of a run (s)
-- Returns 'ok', 'fenced', 'stale' (the head is elsewhere) or 'stopped'.
local head = redis.call('HMGET', KEYS[1], 'token', 'version', 'status', 'reached')
if head[1] ~= ARGV[1] then
  return 'fenced'
end
if head[3] ~= 'running' then
  return 'stopped'
end
if head[2] ~= ARGV[2] then
  return 'stale'
end
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[2], 'token', ARGV[1], 'first', ARGV[2], 'last', ARGV[3])
redis.call('HSET', KEYS[1], 'round', ARGV[3], 'launched', ARGV[3],
  'reached', math.max(tonumber(head[4] or '-1'), tonumber(ARGV[3])))
redis.call('HDEL', KEYS[1], 'called')
for i = 1, #KEYS do
  redis.call('EXPIRE', KEYS[i], ARGV[4])
end
return 'ok'
