#!lua
-- Record deliveries of one tenant, due now, while few of its deliveries wait; they no longer count as given up.
--
-- KEYS  outbox         hash  the tenant's waiting deliveries
--       times          zset  the times of their next attempts
--       undelivered    hash  the tenant's deliveries that were given up
--       outboxes       zset  tenants that have deliveries
-- ARGV  tenant         str   the tenant
--       max_waiting    int   maximum number of its waiting deliveries
--       deliveries...  list  per delivery: id (str), record (bytes, `messages.Delivery`, msgpack)
-- Reply: list of int, for each delivery -1 if it is recorded, also by an earlier call whose reply was lost; otherwise
--        the number of waiting deliveries.
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
