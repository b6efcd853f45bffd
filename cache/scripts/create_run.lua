-- Create a run once. What an earlier life of the name left behind goes first: none of its slots may count.
-- KEYS 1 spec   string  JSON of recipe and config
--      2 head   hash    state of the run
--      3 runs   zset    index of all runs
--      4 active set     names of the runs that are not at rest
--      5... the run's other keys, the slots and leases of the first step included
-- ARGV 1 name, 2 spec JSON, 3 now (s), 4 TTL of a run (s), 5 incarnation (unique id), 6 version, 7 chain,
--      8 skew: 'refuse' if workers of different environments must not mix, else 'admit',
--      9 environment: 'portable' if only workers with portable kernels may compute and update, else '',
--      10 what is to be told of the run, to how many: ',done=1,failed=2,' ('' for nothing),
--      11 weight and 12 priority: its share of the fleet, see ranked.lua
-- Returns {'created', spec} or {'exists', spec of the one that is there}.
local spec = redis.call('GET', KEYS[1])
if spec and redis.call('EXISTS', KEYS[2]) == 1 then
  return {'exists', spec}
end
for i = 5, #KEYS do
  redis.call('DEL', KEYS[i])
end
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[4])
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[2], 'status', 'pending', 'version', ARGV[6], 'chain', ARGV[7], 'token', 0,
  'incarnation', ARGV[5], 'skew', ARGV[8], 'submitted_at', ARGV[3], 'committed_at', ARGV[3],
  'duplicates', 0, 'late', 0, 'weight', ARGV[11], 'priority', ARGV[12])
if ARGV[9] ~= '' then
  redis.call('HSET', KEYS[2], 'environment', ARGV[9], 'server_environment', ARGV[9])
end
if ARGV[10] ~= '' then
  redis.call('HSET', KEYS[2], 'on', ARGV[10])
end
redis.call('EXPIRE', KEYS[2], ARGV[4])
redis.call('ZADD', KEYS[3], ARGV[3], ARGV[1])
redis.call('EXPIRE', KEYS[3], ARGV[4])
redis.call('SADD', KEYS[4], ARGV[1])
redis.call('EXPIRE', KEYS[4], ARGV[4])
return {'created', ARGV[2]}
