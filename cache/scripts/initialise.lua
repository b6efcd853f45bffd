-- Record version 0 (or a restored one) and start the run.
-- KEYS 1 head hash, 2 manifest string, 3 versions hash, 4 events stream
-- ARGV 1 token, 2 manifest JSON, 3 version, 4 version record JSON, 5 dataset size, 6 total steps,
--      7 TTL of a run (s), 8 now (s), 9 events kept, 10 evaluation size,
--      11 digest of the dataset's content ('' if it has none)
-- Returns 'ok', 'fenced', 'stopped'.
if tonumber(redis.call('HGET', KEYS[1], 'token') or '-1') ~= tonumber(ARGV[1]) then
  return 'fenced'
end
local status = redis.call('HGET', KEYS[1], 'status')
if status ~= 'pending' and status ~= 'running' then
  return 'stopped'
end
redis.call('SET', KEYS[2], ARGV[2], 'EX', ARGV[7])
redis.call('HSET', KEYS[3], ARGV[3], ARGV[4])
redis.call('EXPIRE', KEYS[3], ARGV[7])
redis.call('HSET', KEYS[1], 'status', 'running', 'version', ARGV[3], 'dataset_size', ARGV[5],
  'total_steps', ARGV[6], 'evaluation_size', ARGV[10], 'dataset_digest', ARGV[11], 'committed_at', ARGV[8])
redis.call('HSETNX', KEYS[1], 'started_at', ARGV[8])
redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[9], '*', 'type', 'started', 'data',
  cjson.encode({version = tonumber(ARGV[3]), total_steps = tonumber(ARGV[6])}))
redis.call('EXPIRE', KEYS[4], ARGV[7])
return 'ok'
