-- Count one finished header task of a Celery chord and, with the last one, publish the callback: what
-- Celery's own scripts and the client between them do in five round trips, on the same keys and with the
-- same values, but in one transaction. So there is no moment at which a chord is claimed and not called.
-- KEYS 1 results  zset  header index -> JSON [1, task id, state, result]
--      2 total difference, 3 size (strings), 4 set of "task id:index" that are counted,
--      5 claim  string  token of whoever joins the chord, 'done' afterwards
--      6 queue (list) of the callback
-- ARGV 1 task id, 2 JSON [1, task id, state, result], 3 header index, 4 TTL of the chord's keys (s),
--      5 TTL of the mark 'done' (s), 6 7 callback message before and after its body, a JSON string,
--      8 the body after its arguments
-- Returns 'counted', 'called', 'done' (the chord has called back before), or 'join': the chord is complete,
-- but not as simple as this; then Celery joins it. Sent twice, it answers 'done' where it said 'called'.
if redis.call('GET', KEYS[5]) == 'done' then
  return 'done'
end
if redis.call('SADD', KEYS[4], ARGV[1] .. ':' .. ARGV[3]) == 1 then
  redis.call('ZADD', KEYS[1], ARGV[3], ARGV[2])
end
local size = redis.call('GET', KEYS[3])
if not size or redis.call('ZCARD', KEYS[1]) < tonumber(size) + tonumber(redis.call('GET', KEYS[2]) or 0) then
  for i = 1, 4 do
    redis.call('EXPIRE', KEYS[i], ARGV[4])
  end
  return 'counted'
end
if redis.call('EXISTS', KEYS[5]) == 1 then
  return 'join'
end
local results = redis.call('ZRANGE', KEYS[1], 0, -1)
for i, text in ipairs(results) do
  results[i] = string.match(text, '^%[1, "[^"]*", "SUCCESS", (.*)%]$')
  if not results[i] then
    for j = 1, 4 do
      redis.call('EXPIRE', KEYS[j], ARGV[4])
    end
    return 'join'
  end
end
local body = '[[[' .. table.concat(results, ', ') .. ']]' .. ARGV[8]
redis.call('LPUSH', KEYS[6], ARGV[6] .. cjson.encode(body) .. ARGV[7])
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
redis.call('SET', KEYS[5], 'done', 'EX', ARGV[5])
return 'called'
