#!lua flags=allow-oom
-- Take or keep the leadership among schedulers.
--
-- KEYS  leader        string  the leader's token, "<id>:<epoch>"
--       leader_epoch  string  counter of leaderships
-- ARGV  token         str     my token; '' while I do not lead
--       candidate     str     my id
--       ttl_ms        int     ms that the leadership lasts without a renewal
-- Reply: str, my token while I lead, else ''.
local leader, leader_epoch = unpack(KEYS, 2)
local token, candidate, ttl_ms = unpack(ARGV)
local current = redis.call('GET', leader)
if current then
  -- A token with my id is mine, also when the reply that gave it to me was lost.
  if current ~= token and string.sub(current, 1, #candidate + 1) ~= candidate .. ':' then return '' end
  redis.call('PEXPIRE', leader, ttl_ms)
  return current
end
token = candidate .. ':' .. redis.call('INCR', leader_epoch)
redis.call('SET', leader, token, 'PX', ttl_ms)
return token
