-- Write tags and notes of people on a run.
-- KEYS 1 head hash
-- ARGV 1 tags, a JSON list ('' to leave them), 2 whether the notes are to be written ('1'), 3 notes
-- Returns the run's status, or 'missing'.
local status = redis.call('HGET', KEYS[1], 'status')
if not status then
  return 'missing'
end
if ARGV[1] ~= '' then
  redis.call('HSET', KEYS[1], 'tags', ARGV[1])
end
if ARGV[2] == '1' then
  redis.call('HSET', KEYS[1], 'notes', ARGV[3])
end
return status
