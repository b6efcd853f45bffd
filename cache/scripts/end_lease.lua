-- A shard goes back so that it can be computed elsewhere at once: its Client hands it back (shutdown, a
-- transient error), or the supervisor takes it (the worker is not at it any more, or is overdue).
-- KEYS 1 leases hash  shard -> {"worker","attempt","delivery","open","since"}
-- ARGV 1 shard, 2 worker id, 3 delivery id, 4 counts ('1': the try counts towards max_attempts)
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
  if ARGV[4] ~= '1' then
    lease['attempt'] = lease['attempt'] - 1
  end
  redis.call('HSET', KEYS[1], ARGV[1], cjson.encode(lease))
end
return 1
