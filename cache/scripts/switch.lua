-- Change the config of a run from a step on that nobody has launched or is about to launch.
-- KEYS 1 spec string, 2 head hash, 3 events stream
-- ARGV 1 spec JSON with the switch, 2 step from which it holds, 3 incarnation that the caller read,
--      4 the next one, 5 total steps after the switch ('' if not known yet), 6 TTL of a run (s),
--      7 event JSON, 8 events kept
-- Returns 'ok', 'changed' (somebody switched or corrected the run meanwhile), 'late' (the step is too
-- near: a training server may be launching it), or the status of a run at rest, or 'stopped' (by one of
-- its rules).
local status = redis.call('HGET', KEYS[2], 'status')
if status ~= 'pending' and status ~= 'running' and status ~= 'paused' then
  return status or 'missing'
end
if redis.call('HEXISTS', KEYS[2], 'stopped') == 1 then
  return 'stopped'
end
if redis.call('HGET', KEYS[2], 'incarnation') == ARGV[4] then  -- sent twice
  return 'ok'
end
if redis.call('HGET', KEYS[2], 'incarnation') ~= ARGV[3] then
  return 'changed'
end
local step = tonumber(ARGV[2])
local version = tonumber(redis.call('HGET', KEYS[2], 'version'))
local reached = tonumber(redis.call('HGET', KEYS[2], 'reached') or '-1')  -- a rollback takes nothing off it
if step > 0 and (step < version + 2 or step < reached + 2) then
  return 'late'
end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[6])
redis.call('HSET', KEYS[2], 'incarnation', ARGV[4])
if ARGV[5] ~= '' then
  redis.call('HSET', KEYS[2], 'total_steps', ARGV[5])
end
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[8], '*', 'type', 'switched', 'data', ARGV[7])
redis.call('EXPIRE', KEYS[3], ARGV[6])
return 'ok'
