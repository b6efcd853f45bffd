-- Write a gradient slot once: the first writer wins. Its chunks are already stored.
-- KEYS 1 head  hash  state of the run
--      2 slots hash  shard -> JSON of the slot, of this step
-- ARGV 1 step, 2 shard, 3 slot JSON, 4 nonce of this attempt, 5 digest, 6 TTL of the work (s),
--      7 incarnation of the run that it was computed for, without its switches ('' if that is not known),
--      8 version that it was computed at, 9 slot of the partial sum that this one goes into ('' for none),
--      10 and 11 the first and the last slot that go into it
-- Returns {verdict, slots present}: 'written', 'group' (written, and with it all inputs of the partial sum
-- are there: the writer sends it), 'spare' (written, but its partial sum was made before: its bytes are
-- not needed), 'duplicate' (same bytes were there), 'divergent'
-- (other bytes were there: a broken purity), 'late' (step committed), 'early', 'stopped' (run ended,
-- gone, or another run of the same name).
local function written()
  if ARGV[9] == '' then
    return 'written'
  end
  if redis.call('HEXISTS', KEYS[2], ARGV[9]) == 1 then
    return 'spare'
  end
  for slot = tonumber(ARGV[10]), tonumber(ARGV[11]) do
    if redis.call('HEXISTS', KEYS[2], tostring(slot)) == 0 then
      return 'written'
    end
  end
  return 'group'
end
local version = tonumber(redis.call('HGET', KEYS[1], 'version') or '-1')
local status = redis.call('HGET', KEYS[1], 'status')
local step = tonumber(ARGV[1])
if version < 0 or status == 'cancelled' or status == 'done' then
  return {'stopped', 0}
end
if ARGV[7] ~= '' and string.match(redis.call('HGET', KEYS[1], 'incarnation') or '', '^[^+]*') ~= ARGV[7] then
  return {'stopped', 0}
end
if step < version then
  redis.call('HINCRBY', KEYS[1], 'late', 1)
  return {'late', 0}
end
if tonumber(ARGV[8]) > version then
  return {'early', 0}
end
if redis.call('HSETNX', KEYS[2], ARGV[2], ARGV[3]) == 1 then
  redis.call('EXPIRE', KEYS[2], ARGV[6])
  return {written(), redis.call('HLEN', KEYS[2])}
end
local there = cjson.decode(redis.call('HGET', KEYS[2], ARGV[2]))
if there['nonce'] == ARGV[4] then
  return {written(), redis.call('HLEN', KEYS[2])}
end
redis.call('HINCRBY', KEYS[1], 'duplicates', 1)
if there['digest'] ~= ARGV[5] then
  redis.call('HINCRBY', KEYS[1], 'divergent', 1)
  return {'divergent', redis.call('HLEN', KEYS[2])}
end
return {'duplicate', redis.call('HLEN', KEYS[2])}
