-- A part of other scripts: put messages into the queue of shards, in the order in which their runs' shares
-- have them taken. Workers take from its right end.
-- Each message begins with its rank, {"rank": "PRIORITY TIME", ...}. A higher priority is taken first; among
-- equals the smaller time, in which each run advances by the seconds that its messages will take, divided by
-- its weight (start-time fair queueing). A run that was away comes back behind by one batch at most, so that
-- the pauses between its steps cost it nothing and a long rest earns it nothing. What has no rank (a partial
-- sum, which others wait for) is never overtaken.
-- turns  zset  flow (a run, or its predictions) -> time at which its next message begins
-- Returns nothing.
local function rank_of(text)
  local priority, time = string.match(text, '^{"rank": ?"(%-?%d+) ([%d.]+)"')
  time = tonumber(time)
  if time and time < 1e12 then
    return tonumber(priority), time
  end
end

local function ranked(queue, turns, head, flow, seconds, ttl, messages)
  local said = redis.call('HMGET', head, 'weight', 'priority', 'shard_seconds')
  local weight, priority = tonumber(said[1] or '1'), tonumber(said[2] or '0')
  local each = (tonumber(seconds) or tonumber(said[3] or '0.1')) / weight
  local now
  for _, text in ipairs(redis.call('LRANGE', queue, -8, -1)) do
    local _, time = rank_of(text)
    now = time or now
  end
  if not now then
    now = tonumber(redis.call('ZRANGE', turns, -1, -1, 'WITHSCORES')[2] or '0')
  end
  redis.call('ZREMRANGEBYSCORE', turns, '-inf', now - 600)
  local start = math.max(now - math.min(each * #messages, 600), tonumber(redis.call('ZSCORE', turns, flow) or '0'))
  local behind = redis.call('LRANGE', queue, 0, 999)  -- from the left end: what is taken last
  local over = 0
  local function after(place, time)
    local its_priority, its_time = rank_of(behind[place])
    return its_time and (its_priority < priority or (its_priority == priority and its_time > time))
  end
  while over < #behind and after(over + 1, start) do
    over = over + 1
  end
  for number, message in ipairs(messages) do
    local time = start + (number - 1) * each
    local text = string.format('{"rank": "%d %.6f", ', priority, time) .. string.sub(message, 2)
    while over > 0 and not after(over, time) do
      over = over - 1
    end
    if over == 0 then
      redis.call('LPUSH', queue, text)
    else
      redis.call('LINSERT', queue, 'AFTER', behind[over], text)
    end
  end
  redis.call('ZADD', turns, string.format('%.6f', start + #messages * each), flow)
  redis.call('EXPIRE', turns, ttl)
end
