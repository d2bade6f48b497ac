#!lua
-- Add to the time for which adapters were resident on a day. Adapters beyond `max_digests` are counted in one field.
--
-- KEYS  residency    hash  digest -> ms
-- ARGV  max_digests  int   maximum number of digests
--       others       str   field for the others
--       ttl_s        int   TTL of the hash, s
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
