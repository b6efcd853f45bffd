-- Take a dataset's name away. Its chunks are let go afterwards.
-- KEYS 1 hash  digest, record (JSON)
--      2 zset  all datasets: name -> time of the put (s)
-- ARGV 1 name, 2 '1' to delete the record; '0' to take only a name off the index whose record expired
-- Returns 1 if the dataset is gone, 0 if it is there.
if ARGV[2] == '1' then
  redis.call('DEL', KEYS[1])
end
if redis.call('EXISTS', KEYS[1]) == 1 then
  return 0
end
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
