#!lua
-- Note deliveries of one tenant, due now, as long as few of its wait; they are no longer given up.
--
-- KEYS[1]  string  prefix of the shard's keys
-- KEYS[2]  hash    the tenant's deliveries that wait
-- KEYS[3]  zset    the times of their next attempts
-- KEYS[4]  hash    its deliveries that were given up
-- KEYS[5]  zset    tenants that have deliveries
-- ARGV[1]  str     the tenant
-- ARGV[2]  int     most deliveries of it that wait
-- ARGV[3…]         of each delivery: its id, and `messages.Delivery`, msgpack
-- Reply: list of int, of each -1 when it is noted, also when it was: an earlier reply was lost; else how many wait.
local now, replies = now_ms(), {}
for i = 3, #ARGV, 2 do
  local num = redis.call('HLEN', KEYS[2])
  if num >= tonumber(ARGV[2]) and redis.call('HEXISTS', KEYS[2], ARGV[i]) == 0 then
    replies[#replies + 1] = num
  else
    redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
    redis.call('ZADD', KEYS[3], now, ARGV[i])
    redis.call('HDEL', KEYS[4], ARGV[i])
    redis.call('ZADD', KEYS[5], 'LT', now, ARGV[1])
    replies[#replies + 1] = -1
  end
end
return replies
