#!lua
-- Accept a batch, for any gateway to run.
--
-- KEYS  batch         hash   the batch
--       batches       zset   its tenant's batches by creation time
--       open_batches  zset   all open batches
--       tenant_open   set    its tenant's open batches
-- ARGV  id            str    id of the batch
--       tenant        str    its tenant
--       record        bytes  `messages.Batch`, msgpack
--       created_ms    int    unix ms of creation
--       ttl_ms        int    TTL of its record, ms
--       max_open      int    maximum number of its tenant's open batches
--       max_kept      int    maximum number of its tenant's batches, beyond which the oldest ended ones are dropped
-- Reply: int, -1 if it is accepted, also by an earlier call whose reply was lost; else the tenant's open batches.
local batch, batches, open_batches, tenant_open = unpack(KEYS, 2)
local id, tenant, record, created_ms, ttl_ms, max_open, max_kept = unpack(ARGV)
if redis.call('EXISTS', batch) == 1 then return -1 end
local num = redis.call('SCARD', tenant_open)
if num >= tonumber(max_open) then return num end
redis.call('HSET', batch, 'b', record, 'epoch', 0, 'owner', '')
redis.call('ZADD', batches, created_ms, id)
-- Ordered by how many batches the tenant has open, then by age: every tenant's first batch comes before any tenant's
-- second. Scores are below zero, so no unix time equals one; both parts fit into a double's 53 bits.
redis.call('ZADD', open_batches, -2^52 + math.min(num, 255) * 2^42 + tonumber(created_ms), tenant .. ':' .. id)
redis.call('SADD', tenant_open, id)
for _, key in ipairs({batch, batches, tenant_open}) do redis.call('PEXPIRE', key, ttl_ms) end
-- Open batches may be among the oldest: `num` more are looked at. The rest of a large excess is for later calls.
local excess, is_open = redis.call('ZCARD', batches) - max_kept, {}
for _, open in ipairs(redis.call('SMEMBERS', tenant_open)) do is_open[open] = true end
for _, old in ipairs(redis.call('ZRANGE', batches, 0, num + 63)) do
  local key = P .. ':batch:' .. old
  if not is_open[old] and (excess > 0 or redis.call('EXISTS', key) == 0) then
    redis.call('DEL', key)
    redis.call('ZREM', batches, old)
    excess = excess - 1
  end
end
return -1
