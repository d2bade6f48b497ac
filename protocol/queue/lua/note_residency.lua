#!lua
-- Add to the time for which adapters were in pools on a day. Those that come after too many others count in one field.
--
-- KEYS[1]  string  prefix of the shard's keys
-- KEYS[2]  hash    digest -> ms
-- ARGV[1]  int     most digests
-- ARGV[2]  str     field of the others
-- ARGV[3]  int     s that the hash lives
-- ARGV[4...]       per adapter, 2 values: digest (str), ms (int)
-- Reply: nil.
local num = redis.call('HLEN', KEYS[2]) - redis.call('HEXISTS', KEYS[2], ARGV[2])
for a = 4, #ARGV, 2 do
  local digest = ARGV[a]
  if redis.call('HEXISTS', KEYS[2], digest) == 0 then
    if num < tonumber(ARGV[1]) then num = num + 1 else digest = ARGV[2] end
  end
  redis.call('HINCRBY', KEYS[2], digest, ARGV[a + 1])
end
redis.call('EXPIRE', KEYS[2], ARGV[3])
