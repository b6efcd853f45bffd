-- Replace what a run was submitted with, while it stands still: its code was corrected, or a person
-- admits workers that the run refused.
-- A replay of the steps before need not meet what they gave then: see rollback.lua.
-- KEYS 1 spec string, 2 head hash, 3 expected hash
-- ARGV 1 spec JSON, 2 TTL of a run (s), 3 incarnation (the same life, another revision: what workers
--      keep of the run is made anew, and slots computed under the revision before are refused),
--      4 skew ('refuse' or 'admit')
-- Returns 1, or 0 if the run is not paused or failed.
local status = redis.call('HGET', KEYS[2], 'status')
if status ~= 'paused' and status ~= 'failed' then
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
redis.call('HSET', KEYS[2], 'incarnation', ARGV[3], 'skew', ARGV[4],
  'corrected_at', redis.call('HGET', KEYS[2], 'version'))
redis.call('DEL', KEYS[3])
return 1
