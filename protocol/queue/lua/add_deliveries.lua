#!lua
-- Record deliveries of one tenant, due now, while few of its deliveries wait; they no longer count as given up.
-- Once half of the places are taken, an endpoint gets no more than its share of all places, so that one that takes no
-- deliveries does not keep others from getting theirs.
--
-- KEYS  hooks          hash  the tenant's endpoints
--       outbox         hash  the tenant's waiting deliveries
--       times          zset  the times of their next attempts
--       undelivered    hash  the tenant's deliveries that were given up
--       outboxes       zset  tenants that have deliveries
-- ARGV  tenant         str   the tenant
--       max_waiting    int   maximum number of its waiting deliveries
--       deliveries...  list  per delivery: id (str), record (bytes, `messages.Delivery`, msgpack)
-- Reply: list of int, for each delivery -1 if it is recorded, also by an earlier call whose reply was lost; otherwise
--        the number of waiting deliveries.
local hooks, outbox, times, undelivered, outboxes = unpack(KEYS, 2)
local tenant, max_waiting = unpack(ARGV, 1, 2)
max_waiting = tonumber(max_waiting)
local first, now, replies = 3, now_ms(), {}
local share = max_waiting / math.max(1, redis.call('HLEN', hooks))
local waiting = {}  -- endpoint -> number of its waiting deliveries
for _, id in ipairs(redis.call('HKEYS', outbox)) do
  local endpoint = string.match(id, '[^:]*$')
  waiting[endpoint] = (waiting[endpoint] or 0) + 1
end
for a = first, #ARGV, 2 do
  local id, record = unpack(ARGV, a, a + 1)
  local endpoint, num = string.match(id, '[^:]*$'), redis.call('HLEN', outbox)
  local own, is_new = waiting[endpoint] or 0, redis.call('HEXISTS', outbox, id) == 0
  if is_new and (num >= max_waiting or (num >= max_waiting / 2 and own >= share)) then
    replies[#replies + 1] = num
  else
    if is_new then waiting[endpoint] = own + 1 end
    redis.call('HSET', outbox, id, record)
    redis.call('ZADD', times, now, id)
    redis.call('HDEL', undelivered, id)
    redis.call('ZADD', outboxes, 'LT', now, tenant)
    replies[#replies + 1] = -1
  end
end
return replies
