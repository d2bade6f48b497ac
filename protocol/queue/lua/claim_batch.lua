#!lua flags=allow-oom
-- Let a gateway run a batch that no gateway runs, or renew the lease of the one that runs it.
--
-- KEYS  batch         hash  the batch
--       open_batches  zset  all open batches
-- ARGV  id            str   id of the batch
--       tenant        str   its tenant
--       gid           str   the gateway
--       lease_ms      int   ms until the lease expires if it is not renewed
-- Reply: array. {epoch (int), unix ms when the batch was cancelled or 0 (int), `messages.Batch` (bytes), consecutive
--        tries without a new answer (int)}; {} if another gateway runs it, or it has ended.
local batch, open_batches = unpack(KEYS, 2)
local id, tenant, gid, lease_ms = unpack(ARGV)
local member, now = tenant .. ':' .. id, now_ms()
local until_ms = redis.call('ZSCORE', open_batches, member)
if not until_ms then return {} end
local f = redis.call('HMGET', batch, 'b', 'owner', 'epoch', 'cancel', 'tries')
if not f[1] then
  redis.call('ZREM', open_batches, member)
  return {}
end
local is_mine = f[2] == gid and tonumber(until_ms) > 0
if not is_mine and tonumber(until_ms) > now then return {} end
local epoch, tries = tonumber(f[3] or 0), tonumber(f[5] or 0)
if not is_mine then
  -- Its gateway died or stalled: running this batch may be the cause.
  if f[2] and f[2] ~= '' then tries = redis.call('HINCRBY', batch, 'tries', 1) end
  epoch = redis.call('HINCRBY', batch, 'epoch', 1)
  redis.call('HSET', batch, 'owner', gid)
end
redis.call('ZADD', open_batches, now + lease_ms, member)
return {epoch, tonumber(f[4] or 0), f[1], tries}
