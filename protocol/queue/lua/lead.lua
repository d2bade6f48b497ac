-- Take or keep the leadership among schedulers.
-- KEYS: prefix, leader key, epoch counter
-- ARGV: my token ('' when I do not lead), my id, ms
-- -> my token while I lead, '' otherwise
local current = redis.call('GET', KEYS[2])
if current then
  -- With my id in front it is mine, even if the reply that said so was lost.
  if current ~= ARGV[1] and string.sub(current, 1, #ARGV[2] + 1) ~= ARGV[2] .. ':' then return '' end
  redis.call('PEXPIRE', KEYS[2], ARGV[3])
  return current
end
local token = ARGV[2] .. ':' .. redis.call('INCR', KEYS[3])
redis.call('SET', KEYS[2], token, 'PX', ARGV[3])
return token
