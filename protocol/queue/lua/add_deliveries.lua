#!lua
-- Note deliveries of one tenant, due now, as long as few of its wait; they are no longer given up.
--
-- KEYS  outbox         hash  the tenant's deliveries that wait
--       times          zset  the times of their next attempts
--       undelivered    hash  its deliveries that were given up
--       outboxes       zset  tenants that have deliveries
-- ARGV  tenant         str   the tenant
--       max_waiting    int   most deliveries of it that wait
--       deliveries...  list  per delivery: id (str), record (bytes, `messages.Delivery`, msgpack)
-- Reply: list of int, of each -1 when it is noted, also when it was: an earlier reply was lost; else how many wait.
local outbox, times, undelivered, outboxes = unpack(KEYS, 2)
local tenant, max_waiting = unpack(ARGV, 1, 2)
local first, now, replies = 3, now_ms(), {}
for a = first, #ARGV, 2 do
  local id, record = unpack(ARGV, a, a + 1)
  local num = redis.call('HLEN', outbox)
  if num >= tonumber(max_waiting) and redis.call('HEXISTS', outbox, id) == 0 then
    replies[#replies + 1] = num
  else
    redis.call('HSET', outbox, id, record)
    redis.call('ZADD', times, now, id)
    redis.call('HDEL', undelivered, id)
    redis.call('ZADD', outboxes, 'LT', now, tenant)
    replies[#replies + 1] = -1
  end
end
return replies
