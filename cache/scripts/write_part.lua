-- Write one part of an evaluation once.
-- KEYS 1 parts hash, 2 evaluations hash
-- ARGV 1 part, 2 JSON, 3 parts in all, 4 TTL of the work (s), 5 version
-- Returns {verdict, part JSON...}: 'written' (others are missing), 'complete' with all parts in
-- order, 'done' (the evaluation is recorded already).
if redis.call('HEXISTS', KEYS[2], ARGV[5]) == 1 then
  return {'done'}
end
redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[4])
local total = tonumber(ARGV[3])
if redis.call('HLEN', KEYS[1]) < total then
  return {'written'}
end
local reply = {'complete'}
for part = 0, total - 1 do
  reply[#reply + 1] = redis.call('HGET', KEYS[1], tostring(part))
end
return reply
