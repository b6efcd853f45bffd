-- The training server found that a slot's bytes are lost: the slot is opened again.
-- KEYS 1 head   hash  state of the run
--      2 slots  hash  shard -> JSON of the slot, of this step
--      3 leases hash  shard -> holder of this step
-- ARGV 1 token, 2 step, 3 shard, 4 nonce of the slot whose bytes are lost
-- Returns 'ok', 'fenced', or 'stale' (step committed, or the slot is gone or another's).
if tonumber(redis.call('HGET', KEYS[1], 'token') or '-1') ~= tonumber(ARGV[1]) then
  return 'fenced'
end
if tonumber(redis.call('HGET', KEYS[1], 'version')) ~= tonumber(ARGV[2]) then
  return 'stale'
end
local there = redis.call('HGET', KEYS[2], ARGV[3])
if not there or cjson.decode(there)['nonce'] ~= ARGV[4] then
  return 'stale'
end
redis.call('HDEL', KEYS[2], ARGV[3])
redis.call('HDEL', KEYS[3], ARGV[3])
redis.call('HDEL', KEYS[1], 'launched', 'called')
return 'ok'
