-- A training server takes a run over: it gets the next fencing token. Tokens follow the server's clock
-- (microseconds), so that none is given twice, not even after Redis came back from an older snapshot or the
-- name began another life.
-- KEYS 1 head  hash  state of the run
-- ARGV 1 worker id of the taker, 2 its node, 3 worker key prefix, 4 its private queue,
--      5 environment of the taker ('' if that is not known); the first server sets the run's
--      ('portable' before that: the first one with portable kernels),
--      6 the memory that it shares with processes of its host ('' for none)
-- Returns {'acquired', token}, {'owned', queue of the live owner} when another node serves the run,
-- {'skewed', environment that the run's updates need} or {'missing', 0}. A second process of the owner's own node may take over (prefork children take
-- turns): `shared` then tells the server to publish its optimizer state with each version.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {'missing', 0}
end
local owner = redis.call('HGET', KEYS[1], 'owner')
if owner and owner ~= '' and owner ~= ARGV[1] then
  if redis.call('EXISTS', ARGV[3] .. owner) == 1 then
    if redis.call('HGET', KEYS[1], 'node') ~= ARGV[2] then
      return {'owned', redis.call('HGET', KEYS[1], 'queue')}
    end
    redis.call('HSET', KEYS[1], 'shared', 1)
  end
end
if redis.call('HGET', KEYS[1], 'node') ~= ARGV[2] then
  redis.call('HDEL', KEYS[1], 'shared')
end
local environment = redis.call('HGET', KEYS[1], 'server_environment') or ''
local portable = environment == 'portable' and string.find(ARGV[5], ', portable ', 1, true)
if portable or (environment == '' and ARGV[5] ~= '') then
  redis.call('HSET', KEYS[1], 'server_environment', ARGV[5])
elseif ARGV[5] ~= '' and environment ~= ARGV[5] and redis.call('HGET', KEYS[1], 'skew') == 'refuse' then
  return {'skewed', environment}
end
local now = redis.call('TIME')
local token = math.max(tonumber(redis.call('HGET', KEYS[1], 'token')) + 1,
  tonumber(now[1]) * 1000000 + tonumber(now[2]))
redis.call('HSET', KEYS[1], 'token', string.format('%.0f', token), 'owner', ARGV[1], 'node', ARGV[2], 'queue', ARGV[4],
  'memory', ARGV[6])
return {'acquired', token}
