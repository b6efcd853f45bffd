-- A process takes or renews the supervisor's lease.
-- KEYS 1 supervisor  string  worker id of the holder
-- ARGV 1 worker id, 2 lease (ms), 3 worker id of a holder that is known to be dead ('' for none)
-- Returns the holder's worker id: the first argument's if the lease is now its own.
local holder = redis.call('GET', KEYS[1])
if not holder or holder == ARGV[1] or (ARGV[3] ~= '' and holder == ARGV[3]) then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  return ARGV[1]
end
return holder
