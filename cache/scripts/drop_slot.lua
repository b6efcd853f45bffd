-- A slot's bytes are lost: it is opened again, by the training server, or by a Client that was to add it up.
-- KEYS 1 head   hash  state of the run
--      2 slots  hash  shard (or partial sum) -> JSON of the slot, of this step
--      3 leases hash  the same -> holder of this step
-- ARGV 1 token ('' for a Client), 2 step, 3 slot, 4 nonce of the slot whose bytes are lost,
--      5 slot of the partial sum that it goes into ('' for none): once that is made, nobody needs the bytes,
--      6... the slots that it was made from: their bytes went with its making, so they are opened, too
-- Returns 'ok', 'fenced', or 'stale' (step committed, or the slot is gone, another's, or not needed).
if ARGV[1] ~= '' and tonumber(redis.call('HGET', KEYS[1], 'token') or '-1') ~= tonumber(ARGV[1]) then
  return 'fenced'
end
local version, step = tonumber(redis.call('HGET', KEYS[1], 'version') or '-1'), tonumber(ARGV[2])
if version < 0 or version > step or (ARGV[1] ~= '' and version ~= step) then
  return 'stale'
end
local there = redis.call('HGET', KEYS[2], ARGV[3])
if not there or cjson.decode(there)['nonce'] ~= ARGV[4] then
  return 'stale'
end
if ARGV[5] ~= '' and redis.call('HEXISTS', KEYS[2], ARGV[5]) == 1 then
  return 'stale'
end
for index = 3, #ARGV do
  if index == 3 or index > 5 then
    redis.call('HDEL', KEYS[2], ARGV[index])
    redis.call('HDEL', KEYS[3], ARGV[index])
  end
end
if ARGV[1] ~= '' then
  redis.call('HDEL', KEYS[1], 'launched', 'called')
end
return 'ok'
