-- Say how the delivery of an entry of the outbox went. Whoever told it may be late: told is told.
-- KEYS 1 outbox hash, 2 telling hash, 3 events stream
-- ARGV 1 id, 2 worker, 3 'told', 'again' or 'dead', 4 seconds until it is tried again, 5 what went wrong,
--      6 event JSON, 7 TTL of a run (s), 8 events kept
-- Returns 'ok', or 'late': it was told before, or another worker has it by now.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then  -- told before
  return 'late'
end
local event = 'told'
if ARGV[3] == 'told' then
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('HDEL', KEYS[2], ARGV[1])
else
  local read, standing = pcall(cjson.decode, redis.call('HGET', KEYS[2], ARGV[1]) or '')
  if not read or type(standing) ~= 'table' or standing['holder'] ~= ARGV[2] then  -- another one has it by now
    return 'late'
  end
  local clock = redis.call('TIME')
  local due = tonumber(clock[1]) + tonumber(clock[2]) / 1e6 + tonumber(ARGV[4])
  redis.call('HSET', KEYS[2], ARGV[1], cjson.encode({tries = standing['tries'], due = due, error = ARGV[5],
    dead = ARGV[3] == 'dead' or nil}))
  redis.call('EXPIRE', KEYS[2], ARGV[7])
  if ARGV[3] ~= 'dead' then
    return 'ok'
  end
  event = 'not told'
end
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[8], '*', 'type', event, 'data', ARGV[6])
redis.call('EXPIRE', KEYS[3], ARGV[7])
return 'ok'
