#!lua flags=allow-oom
-- Take or keep the leadership among schedulers.
--
-- KEYS[1]  string  prefix of the shard's keys
-- KEYS[2]  string  the leader's token, "<id>:<epoch>"
-- KEYS[3]  string  counter of leaderships
-- ARGV[1]  str     my token; '' while I do not lead
-- ARGV[2]  str     my id
-- ARGV[3]  int     ms that the leadership lasts without a renewal
-- Reply: str, my token while I lead, else ''.
local current = redis.call('GET', KEYS[2])
if current then
  -- A token with my id is mine, also when the reply that gave it to me was lost.
  if current ~= ARGV[1] and string.sub(current, 1, #ARGV[2] + 1) ~= ARGV[2] .. ':' then return '' end
  redis.call('PEXPIRE', KEYS[2], ARGV[3])
  return current
end
local token = ARGV[2] .. ':' .. redis.call('INCR', KEYS[3])
redis.call('SET', KEYS[2], token, 'PX', ARGV[3])
return token
