#!lua flags=allow-oom
-- Delete ends of a tenant for which deliveries were made, and move the tenant behind all others that wait.
--
-- KEYS  tenant_ends  stream  the tenant's ends
--       ends         zset    tenants that have ends
-- ARGV  tenant       str     the tenant
--       entries...   str     entry ids, at least one
-- Reply: nothing.
local tenant_ends, ends = unpack(KEYS, 2)
local tenant = unpack(ARGV, 1, 1)
local first = 2
redis.call('XDEL', tenant_ends, unpack(ARGV, first))
if redis.call('XLEN', tenant_ends) == 0 then
  redis.call('UNLINK', tenant_ends)
  redis.call('ZREM', ends, tenant)
else
  redis.call('ZADD', ends, turn_ms(), tenant)
end
