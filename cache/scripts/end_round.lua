-- A participant has come to a round's end: one of them stores the last version, and says so; the others stay until
-- it has, since it may die.
-- KEYS 1 head hash, 2 round hash, 3 versions hash
-- ARGV 1 token of the round, 2 worker, 3 worker key prefix, 4 wake key prefix, 5 version that the worker holds,
--      6 record JSON of that version, whose bytes and state are stored ('' to ask), 7 TTL of a run (s),
--      8 '1' if the worker has to leave: the round ends only if nobody else is in it,
--      9 TTL of a wake (s), 10 first step of the round
-- Returns 'publish' (it is yours to store it), 'wait', 'over' (it is stored, or others see to it), 'behind' (others
-- are further on, or made other bytes of a version) or 'fenced'.
local head = redis.call('HMGET', KEYS[1], 'token', 'version', 'round')
local round = redis.call('HMGET', KEYS[2], 'token', 'published', 'publisher', 'waiting', 'ending', 'first')
if head[1] ~= ARGV[1] or round[1] ~= ARGV[1] or round[6] ~= ARGV[10] or not head[3] then
  return 'fenced'
end
if round[2] == ARGV[5] then
  return 'over'
end
if head[2] ~= ARGV[5] or round[5] == 'disputed' then
  return 'behind'
end
if ARGV[6] ~= '' then
  redis.call('HSET', KEYS[3], ARGV[5], ARGV[6])
  redis.call('EXPIRE', KEYS[3], ARGV[7])
  redis.call('HSET', KEYS[2], 'published', ARGV[5], 'waiting', '')
  for worker in string.gmatch(round[4] or '', '[^,]+') do
    redis.call('LPUSH', ARGV[4] .. worker, '1')
    redis.call('EXPIRE', ARGV[4] .. worker, ARGV[9])
  end
  return 'over'
end
if ARGV[8] == '1' then
  for _, field in ipairs(redis.call('HKEYS', KEYS[2])) do
    local other = string.match(field, '^p:(.*)$')
    if other and other ~= ARGV[2] and redis.call('EXISTS', ARGV[3] .. other) == 1 then
      redis.call('HDEL', KEYS[2], 'p:' .. ARGV[2])  -- nobody else who leaves counts on it
      return 'over'
    end
  end
  redis.call('HSET', KEYS[2], 'ending', 'left')
end
if not round[3] or round[3] == ARGV[2] or redis.call('EXISTS', ARGV[3] .. round[3]) == 0
    or redis.call('HEXISTS', KEYS[2], 'p:' .. round[3]) == 0 then
  redis.call('HSET', KEYS[2], 'publisher', ARGV[2])
  return 'publish'
end
local waiting = round[4] or ''
if not string.find(',' .. waiting .. ',', ',' .. ARGV[2] .. ',', 1, true) then
  redis.call('HSET', KEYS[2], 'waiting', waiting .. ',' .. ARGV[2])
end
return 'wait'
