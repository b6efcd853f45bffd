-- Uses entrusted.lua
-- Change the status of a run, if it is in one of the states that allow it.
-- KEYS 1 head hash, 2 active set, 3 events stream, 4 slots hash of the step in ARGV 12 (of the present
--      step if there is none), 5 leases hash of the same step, 6 outbox hash, 7 set of the runs that have one
-- ARGV 1 name, 2 new status, 3 allowed states (comma-separated, with a comma at both ends), 4 event type,
--      5 event JSON, 6 error JSON ('' to clear, '-' to leave), 7 TTL of a run (s), 8 events kept,
--      9 token ('' if the caller is not the training server), 10 nonce of the request,
--      11 incarnation that it is about ('' for any), 12 step and 13 shard that it is about ('' for none),
--      14 id and 15 text of the entry for the outbox, 16 entries there at most, 17 event JSON where it is full
-- Returns {'ok', old status}, {'fenced', status}, {'refused', present status}, or {'late', status}: the
-- reason for the change no longer holds (the shard's slot is written, or it is another run by now).
local status = redis.call('HGET', KEYS[1], 'status')
if not status then
  return {'refused', 'missing'}
end
if redis.call('HGET', KEYS[1], 'changed') == ARGV[10] then  -- sent twice
  return {'ok', redis.call('HGET', KEYS[1], 'changed_from')}
end
if ARGV[9] ~= '' and redis.call('HGET', KEYS[1], 'token') ~= ARGV[9] then
  return {'fenced', status}
end
if ARGV[11] ~= '' and string.match(redis.call('HGET', KEYS[1], 'incarnation') or '', '^[^+]*') ~= string.match(ARGV[11], '^[^+]*') then
  return {'late', status}
end
if ARGV[12] ~= '' and (tonumber(redis.call('HGET', KEYS[1], 'version')) > tonumber(ARGV[12])
    or redis.call('HEXISTS', KEYS[4], ARGV[13]) == 1) then
  return {'late', status}
end
if not string.find(ARGV[3], ',' .. status .. ',', 1, true) then
  return {'refused', status}
end
redis.call('HSET', KEYS[1], 'status', ARGV[2], 'changed', ARGV[10], 'changed_from', status)
if ARGV[6] == '' then
  redis.call('HDEL', KEYS[1], 'error')
elseif ARGV[6] ~= '-' then
  redis.call('HSET', KEYS[1], 'error', ARGV[6])
end
if ARGV[2] == 'running' or ARGV[2] == 'pending' then
  redis.call('HDEL', KEYS[1], 'launched', 'called')
  local leases = redis.call('HGETALL', KEYS[5])
  for i = 1, #leases, 2 do  -- the tries before count no more
    local lease = cjson.decode(leases[i + 1])
    lease['attempt'] = 0
    redis.call('HSET', KEYS[5], leases[i], cjson.encode(lease))
  end
  redis.call('SADD', KEYS[2], ARGV[1])
  redis.call('EXPIRE', KEYS[2], ARGV[7])
else
  redis.call('SREM', KEYS[2], ARGV[1])
end
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[8], '*', 'type', ARGV[4], 'data', ARGV[5])
redis.call('EXPIRE', KEYS[3], ARGV[7])
entrusted(KEYS[1], KEYS[6], KEYS[7], KEYS[3], ARGV[1], ARGV[4], {ARGV[14], ARGV[15], ARGV[16], ARGV[17]},
  ARGV[7], ARGV[8])
return {'ok', status}
