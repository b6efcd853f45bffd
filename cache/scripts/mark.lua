-- The training server notes how far the chord of a step has come: of the present one, or with staleness
-- of the last one under way.
-- KEYS 1 head hash
-- ARGV 1 token, 2 step, 3 what: 'launched' (it was published) or 'called' (it called back)
-- Returns 'ok', 'fenced', or 'stale' (the head is beyond that step).
if tonumber(redis.call('HGET', KEYS[1], 'token') or '-1') ~= tonumber(ARGV[1]) then
  return 'fenced'
end
if tonumber(redis.call('HGET', KEYS[1], 'version')) > tonumber(ARGV[2]) then
  return 'stale'
end
redis.call('HSET', KEYS[1], ARGV[3], ARGV[2])
if ARGV[3] == 'launched' then
  redis.call('HDEL', KEYS[1], 'called')
  local reached = tonumber(redis.call('HGET', KEYS[1], 'reached') or '-1')
  redis.call('HSET', KEYS[1], 'reached', math.max(reached, tonumber(ARGV[2])))
end
return 'ok'
