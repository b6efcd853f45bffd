-- Tell of a blob that is on its way. Nothing is decided by it; what is told of a name replaces what was.
-- KEYS 1 underway hash: 'slot:NUMBER' or 'parameters' -> JSON of `torchord.cache.blobs.read_ahead.Notice`
-- ARGV 1 field, 2 JSON, 3 TTL of the hash (s)
-- Returns 'ok'.
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 'ok'
