-- A part of other scripts: leave an event in a run's outbox, an entry for each addressee that its head names.
-- head, outbox, runs, events  keys of the run's head and outbox, of the set of runs that have one, of its events
-- run    name of the run
-- event  type of the event
-- entry  {id, text, entries there at most, event JSON where it is full}
-- ttl    of a run (s)
-- kept   events kept
-- Returns nothing.
local function entrusted(head, outbox, runs, events, run, event, entry, ttl, kept)
  local many = string.match(redis.call('HGET', head, 'on') or '', ',' .. event .. '=(%d),')
  for place = 0, tonumber(many or '0') - 1 do
    if redis.call('HLEN', outbox) < tonumber(entry[3]) then
      redis.call('HSET', outbox, entry[1] .. '.' .. place, entry[2])
      redis.call('EXPIRE', outbox, ttl)
      redis.call('SADD', runs, run)
      redis.call('EXPIRE', runs, ttl)
    else
      redis.call('XADD', events, 'MAXLEN', '~', kept, '*', 'type', 'not told', 'data', entry[4])
    end
  end
end

