#!lua flags=allow-oom
-- Give a tenant its turn: take some of its deliveries that are due, and put it behind all others that wait for theirs.
--
-- KEYS  outbox    hash  the tenant's deliveries that wait
--       times     zset  the times of their next attempts
--       outboxes  zset  tenants that have deliveries
-- ARGV  tenant    str   the tenant
--       num       int   most deliveries to take; 0: it has its turn and nothing else
--       claim_ms  int   ms after which those that were taken are due again, if nothing is heard of them
-- Reply: list of the id and `messages.Delivery`, msgpack, of each that was taken, the most overdue first.
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
