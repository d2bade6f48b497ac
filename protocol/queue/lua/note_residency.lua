#!lua
-- Add to the time for which adapters were in pools on a day. Those that come after too many others count in one field.
--
-- KEYS  residency    hash  digest -> ms
-- ARGV  max_digests  int   most digests
--       others       str   field of the others
--       ttl_s        int   s that the hash lives
--       times...     list  per adapter: digest (str), ms (int)
-- Reply: nil.
local residency = unpack(KEYS, 2)
local max_digests, others, ttl_s = unpack(ARGV, 1, 3)
local first = 4
local num = redis.call('HLEN', residency) - redis.call('HEXISTS', residency, others)
for a = first, #ARGV, 2 do
  local digest, ms = unpack(ARGV, a, a + 1)
  if redis.call('HEXISTS', residency, digest) == 0 then
    if num < tonumber(max_digests) then num = num + 1 else digest = others end
  end
  redis.call('HINCRBY', residency, digest, ms)
end
redis.call('EXPIRE', residency, ttl_s)
