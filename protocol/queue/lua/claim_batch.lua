#!lua flags=allow-oom
-- Let a gateway run a batch that nobody runs, or go on with one that it runs.
--
-- KEYS  batch         hash  the batch
--       open_batches  zset  all open batches
-- ARGV  id            str   id of the batch
--       tenant        str   its tenant
--       gid           str   the gateway
--       lease_ms      int   ms for which it is the gateway's without another call
-- Reply: array. {epoch (int), unix ms when the batch was cancelled or 0 (int), `messages.Batch` (bytes), tries by which
--        nothing more of it was answered (int)}; {} when it is another's, or has ended.
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
  -- Its gateway has fallen silent: what it does may be what ends gateways.
  if f[2] and f[2] ~= '' then tries = redis.call('HINCRBY', batch, 'tries', 1) end
  epoch = redis.call('HINCRBY', batch, 'epoch', 1)
  redis.call('HSET', batch, 'owner', gid)
end
redis.call('ZADD', open_batches, now + lease_ms, member)
return {epoch, tonumber(f[4] or 0), f[1], tries}
