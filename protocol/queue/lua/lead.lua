#!lua flags=allow-oom
-- Take or keep the leadership among schedulers.
--
-- KEYS  leader        string  the leader's token, "<id>:<epoch>"
--       leader_epoch  string  how often a scheduler became the leader
-- ARGV  token         str     the caller's token; '' while it does not lead
--       candidate     str     the caller's id
--       ttl_ms        int     ms until the leadership ends if it is not renewed
-- Reply: str, the caller's token while it leads, else ''.
local leader, leader_epoch = unpack(KEYS, 2)
local token, candidate, ttl_ms = unpack(ARGV)
local current = redis.call('GET', leader)
if current then
  -- A token with the caller's id is its own, even if the reply that contained it was lost.
  if current ~= token and string.sub(current, 1, #candidate + 1) ~= candidate .. ':' then return '' end
  redis.call('PEXPIRE', leader, ttl_ms)
  return current
end
token = candidate .. ':' .. redis.call('INCR', leader_epoch)
redis.call('SET', leader, token, 'PX', ttl_ms)
return token
