-- A Client asks whether it should compute a shard, and takes the lease on it.
-- KEYS 1 head   hash  state of the run
--      2 slots  hash  shard -> finished slot, of this step
--      3 leases hash  shard -> {"worker","attempt","delivery","open","since"} of this step
-- ARGV 1 step, 2 shard, 3 worker id, 4 worker key prefix, 5 backup ('1': compute beside a live holder),
--      6 TTL of the work (s), 7 delivery id (the Celery task id, for a request that is sent twice),
--      8 environment of the worker ('' if that is not known); the first one to compute sets the run's
--      ('portable' before that: the first one with portable kernels),
--      9 version that the step is computed at (the step itself, or an earlier one with staleness)
-- Returns {verdict, attempt, incarnation, memory that the training server shares with its host ('' for none;
-- with 'compute' only)}: 'compute', 'duplicate' (slot written), 'late' (step committed),
-- 'early' (head is behind), 'held' (a live worker is at it), 'stopped' (run not running), 'skewed' (the
-- run refuses this environment). `attempt` counts the starts after a death or an overdue try; a backup
-- beside a live holder is none, but `backups` (see late_shard) goes on.
local status = redis.call('HGET', KEYS[1], 'status')
local incarnation = redis.call('HGET', KEYS[1], 'incarnation') or ''
if status ~= 'running' then
  return {'stopped', 0, incarnation}
end
local version = tonumber(redis.call('HGET', KEYS[1], 'version'))
local step = tonumber(ARGV[1])
if step < version then
  redis.call('HINCRBY', KEYS[1], 'late', 1)
  return {'late', 0, incarnation}
end
if tonumber(ARGV[9]) > version then
  return {'early', 0, incarnation}
end
if redis.call('HEXISTS', KEYS[2], ARGV[2]) == 1 then
  redis.call('HINCRBY', KEYS[1], 'duplicates', 1)
  return {'duplicate', 0, incarnation}
end
local environment = redis.call('HGET', KEYS[1], 'environment') or ''
local portable = environment == 'portable' and string.find(ARGV[8], ', portable ', 1, true)
if portable or (environment == '' and ARGV[8] ~= '') then
  redis.call('HSET', KEYS[1], 'environment', ARGV[8])
elseif ARGV[8] ~= '' and environment ~= ARGV[8] and redis.call('HGET', KEYS[1], 'skew') == 'refuse' then
  return {'skewed', 0, incarnation}
end
local memory = redis.call('HGET', KEYS[1], 'memory') or ''
local attempt, backups = 1, nil
local held = redis.call('HGET', KEYS[3], ARGV[2])
if held then
  local lease = cjson.decode(held)
  attempt = lease['attempt'] + 1
  if lease['open'] and lease['delivery'] == ARGV[7] and lease['worker'] == ARGV[3] then
    return {'compute', lease['attempt'], incarnation, memory}
  end
  if lease['open'] and redis.call('EXISTS', ARGV[4] .. lease['worker']) == 1 then
    if ARGV[5] ~= '1' then
      redis.call('HINCRBY', KEYS[1], 'duplicates', 1)
      return {'held', lease['attempt'], incarnation}
    end
    attempt, backups = lease['attempt'], lease['backups']
  end
end
local now = redis.call('TIME')
redis.call('HSET', KEYS[3], ARGV[2], cjson.encode({worker = ARGV[3], attempt = attempt, delivery = ARGV[7],
  open = true, since = tonumber(now[1]) + tonumber(now[2]) / 1e6, backups = backups}))
redis.call('EXPIRE', KEYS[3], ARGV[6])
return {'compute', attempt, incarnation, memory}
