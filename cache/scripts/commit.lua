-- Uses ranked.lua
-- Commit one global step: complete step + expected head + fencing token -> new head.
-- The blobs of the new version are already stored; this moves the pointer.
-- KEYS 1 head hash, 2 slots hash, 3 leases hash, 4 ledger hash, 5 versions hash, 6 pins hash,
--      7 events stream, 8 expected hash, 9 spec, 10 manifest, 11 evaluations, 12 active set, 13 runs zset,
--      14 Celery's size of the next chord (string), 15 the queue (list) of its messages, 16 turns (zset), see
--      ranked.lua: with ARGV 13 only
-- ARGV 1 step (= version it starts from), 2 token, 3 shards in the step, 4 ledger entry JSON,
--      5 version record JSON, 6 new chain, 7 now (s), 8 TTL of a run (s), 9 event JSON,
--      10 events kept, 11 now (ms), 12 versions to drop unless they are pinned (comma-separated),
--      and for the launch of a further step with the commit: 13 that step, 14 incarnation that its messages
--      are for, 15 size of the chord, 16 TTL of that (s), 17 name of the run, 18 seconds that a shard takes,
--      19 TTL of the turns (s), 20... the messages
-- Returns {'ok', '1' if that step is launched (now, or before), incarnation, versions kept..., '|', pinned
-- versions..., '|', records of the versions dropped...}, or {verdict}: 'fenced', 'stale', 'incomplete',
-- 'stopped', 'diverged' (a replay that did not meet the chain it had before). Nothing is launched under
-- another incarnation (a switch of the config came between) and nothing twice.
local version = tonumber(redis.call('HGET', KEYS[1], 'version') or '-1')
local step = tonumber(ARGV[1])
if tonumber(redis.call('HGET', KEYS[1], 'token') or '-1') ~= tonumber(ARGV[2]) then
  return {'fenced'}
end
local again = (version == step + 1 and redis.call('HGET', KEYS[1], 'chain') == ARGV[6])
if not again then
  if version ~= step then
    return {'stale'}
  end
  local status = redis.call('HGET', KEYS[1], 'status')
  if status ~= 'running' then
    return {'stopped'}
  end
  if redis.call('HLEN', KEYS[2]) ~= tonumber(ARGV[3]) then
    return {'incomplete'}
  end
  local field = tostring(step + 1)
  local expected = redis.call('HGET', KEYS[8], field)
  if expected and expected ~= ARGV[6] then
    return {'diverged'}
  end
  redis.call('HDEL', KEYS[8], field)
  redis.call('HSET', KEYS[4], field, ARGV[4])
  redis.call('HSET', KEYS[5], field, ARGV[5])
  redis.call('HSET', KEYS[1], 'version', field, 'chain', ARGV[6], 'committed_at', ARGV[7])
  redis.call('DEL', KEYS[2], KEYS[3])
  redis.call('XADD', KEYS[7], 'MAXLEN', '~', ARGV[10], '*', 'type', 'step', 'data', ARGV[9])
  for _, index in ipairs({1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13}) do
    redis.call('EXPIRE', KEYS[index], ARGV[8])
  end
else  -- a participant of a round may have taken the step, and stored nothing
  redis.call('HSETNX', KEYS[5], tostring(step + 1), ARGV[5])
end
local incarnation = redis.call('HGET', KEYS[1], 'incarnation') or ''
local launched = '0'
if ARGV[13] and incarnation == ARGV[14] then
  launched = '1'
  if tonumber(redis.call('HGET', KEYS[1], 'launched') or '-1') < tonumber(ARGV[13]) then
    redis.call('SET', KEYS[14], ARGV[15], 'EX', ARGV[16])
    local messages = {}
    for i = 20, #ARGV do
      messages[#messages + 1] = ARGV[i]
    end
    redis.call('HSET', KEYS[1], 'shard_seconds', ARGV[18])
    ranked(KEYS[15], KEYS[16], KEYS[1], ARGV[17], ARGV[18], ARGV[19], messages)
    local reached = tonumber(redis.call('HGET', KEYS[1], 'reached') or '-1')
    redis.call('HSET', KEYS[1], 'launched', ARGV[13], 'reached', math.max(reached, tonumber(ARGV[13])))
    redis.call('HDEL', KEYS[1], 'called')
  end
end
local pins, pinned = redis.call('HGETALL', KEYS[6]), {}
for i = 1, #pins, 2 do
  if tonumber(pins[i + 1]) < tonumber(ARGV[11]) then
    redis.call('HDEL', KEYS[6], pins[i])
  else
    pinned[pins[i]] = true
  end
end
local dropped = {}
for version in string.gmatch(ARGV[12] or '', '[^,]+') do
  local record = not pinned[version] and redis.call('HGET', KEYS[5], version)
  if record then
    dropped[#dropped + 1] = record
    redis.call('HDEL', KEYS[5], version)
  end
end
local reply = {'ok', launched, incarnation}
for _, kept in ipairs(redis.call('HKEYS', KEYS[5])) do
  reply[#reply + 1] = kept
end
reply[#reply + 1] = '|'
for version, _ in pairs(pinned) do
  reply[#reply + 1] = version
end
reply[#reply + 1] = '|'
for _, record in ipairs(dropped) do
  reply[#reply + 1] = record
end
return reply
