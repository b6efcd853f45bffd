-- A worker that computes for a compiled run says what compiles there; the first one decides.
-- KEYS 1 head hash
-- ARGV 1 toolchain (a line of text)
-- Returns the toolchain in force: the first one that was given (this one, if the run is gone).
if redis.call('EXISTS', KEYS[1]) == 0 then
  return ARGV[1]
end
redis.call('HSETNX', KEYS[1], 'toolchain', ARGV[1])
return redis.call('HGET', KEYS[1], 'toolchain')
