#!lua flags=allow-oom
-- Give a tenant its turn: take some of its deliveries that are due, and put it behind all others that wait for theirs.
--
-- KEYS[1]  string  prefix of the shard's keys
-- KEYS[2]  hash    the tenant's deliveries that wait
-- KEYS[3]  zset    the times of their next attempts
-- KEYS[4]  zset    tenants that have deliveries
-- ARGV[1]  str     the tenant
-- ARGV[2]  int     most deliveries to take; 0: it has its turn and nothing else
-- ARGV[3]  int     ms after which those that were taken are due again, if nothing is heard of them
-- Reply: list of the id and `messages.Delivery`, msgpack, of each that was taken, the most overdue first.
local now, taken = now_ms(), {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now, 'LIMIT', 0, ARGV[2])) do
  local raw = redis.call('HGET', KEYS[2], id)
  if raw then
    redis.call('ZADD', KEYS[3], now + ARGV[3], id)
    taken[#taken + 1] = id
    taken[#taken + 1] = raw
  else
    redis.call('ZREM', KEYS[3], id)
  end
end
local first = redis.call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')
if first[1] then
  redis.call('ZADD', KEYS[4], math.max(turn_ms(), tonumber(first[2])), ARGV[1])
else
  redis.call('ZREM', KEYS[4], ARGV[1])
end
return taken
