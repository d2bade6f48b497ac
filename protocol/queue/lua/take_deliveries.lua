#!lua flags=allow-oom
-- Give a tenant its turn: take some of its deliveries that are due, and move it behind all others that wait.
--
-- KEYS  outbox    hash  the tenant's waiting deliveries
--       times     zset  the times of their next attempts
--       outboxes  zset  tenants that have deliveries
-- ARGV  tenant    str   the tenant
--       num       int   maximum deliveries to take; 0: only move the tenant
--       claim_ms  int   ms after which taken deliveries are due again unless they are done or postponed
-- Reply: list of the id and `messages.Delivery`, msgpack, of each taken delivery, the most overdue first.
local outbox, times, outboxes = unpack(KEYS, 2)
local tenant, num, claim_ms = unpack(ARGV)
local now, taken = now_ms(), {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', times, '-inf', now, 'LIMIT', 0, num)) do
  local raw = redis.call('HGET', outbox, id)
  if raw then
    redis.call('ZADD', times, now + claim_ms, id)
    taken[#taken + 1] = id
    taken[#taken + 1] = raw
  else
    redis.call('ZREM', times, id)
  end
end
local first = redis.call('ZRANGE', times, 0, 0, 'WITHSCORES')
if first[1] then
  redis.call('ZADD', outboxes, math.max(turn_ms(), tonumber(first[2])), tenant)
else
  redis.call('ZREM', outboxes, tenant)
end
return taken
