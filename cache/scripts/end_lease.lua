-- A Client hands a shard back (shutdown, a transient error) so that it can go elsewhere at once.
-- KEYS 1 leases hash  shard -> {"worker","attempt","delivery","open"}
-- ARGV 1 shard, 2 worker id, 3 delivery id
-- Returns 1 if the lease was this delivery's and is now closed, else 0.
local held = redis.call('HGET', KEYS[1], ARGV[1])
if not held then
  return 0
end
local lease = cjson.decode(held)
if lease['worker'] ~= ARGV[2] or lease['delivery'] ~= ARGV[3] then
  return 0
end
if lease['open'] then
  lease['open'] = false
  lease['attempt'] = lease['attempt'] - 1  -- only a worker's death counts as a try
  redis.call('HSET', KEYS[1], ARGV[1], cjson.encode(lease))
end
return 1
