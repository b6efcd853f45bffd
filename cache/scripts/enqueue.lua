-- Uses ranked.lua
-- Put messages of one run into the queue of shards, where its share of the fleet has them taken.
-- KEYS 1 queue list, 2 turns zset, 3 head hash of the run, 4 Celery's size of their chord (string): with ARGV 4
-- ARGV 1 flow: whose turn it is (the run, or its predictions), 2 seconds that each will take ('' for a shard's),
--      3 TTL of the turns (s), 4 size of the chord ('' for none), 5 TTL of that (s), 6... messages
-- Returns how many these are.
-- The size comes first, as in Celery's own order: a header that finishes before it is known would not be counted.
if ARGV[4] ~= '' then
  redis.call('SET', KEYS[4], ARGV[4], 'EX', ARGV[5])
end
local messages = {}
for i = 6, #ARGV do
  messages[#messages + 1] = ARGV[i]
end
ranked(KEYS[1], KEYS[2], KEYS[3], ARGV[1], ARGV[2], ARGV[3], messages)
return #messages
