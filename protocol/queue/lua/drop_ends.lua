#!lua flags=allow-oom
-- Forget ends of a tenant that deliveries were made of, and put it behind all others that wait for their turn.
--
-- KEYS[1]  string  prefix of the shard's keys
-- KEYS[2]  stream  the tenant's ends
-- KEYS[3]  zset    tenants that have ends
-- ARGV[1]  str     the tenant
-- ARGV[2…] str     ids of entries, at least one
-- Reply: nothing.
redis.call('XDEL', KEYS[2], unpack(ARGV, 2))
if redis.call('XLEN', KEYS[2]) == 0 then
  redis.call('UNLINK', KEYS[2])
  redis.call('ZREM', KEYS[3], ARGV[1])
else
  redis.call('ZADD', KEYS[3], turn_ms(), ARGV[1])
end
