#!lua flags=allow-oom
-- Write the progress of a batch, by the gateway that runs it.
--
-- KEYS  batch         hash   the batch
--       open_batches  zset   all open batches
--       tenant_open   set    its tenant's open batches
-- ARGV  id            str    id of the batch
--       tenant        str    its tenant
--       epoch         int    epoch under which the gateway runs it
--       record        bytes  `messages.Batch`, msgpack
--       outcome       str    '1': it has ended; '0': this gateway stops running it, and another may; '': it continues
--       status        str    its status
--       wait_ms       int    with outcome '0', ms until another gateway may run it; 0: now, after the first batches of tenants
--                            that wait already
--       tries         int | str  consecutive tries without a new answer; '': unchanged
-- Reply: int, 1 if it is written, 0 if another gateway runs it by now, or it has ended.
local batch, open_batches, tenant_open = unpack(KEYS, 2)
local id, tenant, epoch, record, outcome, status, wait_ms, tries = unpack(ARGV)
local member = tenant .. ':' .. id
if not redis.call('ZSCORE', open_batches, member) then return 0 end
if redis.call('HGET', batch, 'epoch') ~= epoch then return 0 end
redis.call('HSET', batch, 'b', record)
if tries ~= '' then redis.call('HSET', batch, 'tries', tries) end
if outcome == '1' then
  redis.call('ZREM', open_batches, member)
  redis.call('SREM', tenant_open, id)
  tell_end(tenant, id, 'batch.' .. status)
elseif outcome == '0' then
  wait_ms = tonumber(wait_ms)
  redis.call('ZADD', open_batches, wait_ms > 0 and now_ms() + wait_ms or -2^52 + now_ms(), member)
  redis.call('HSET', batch, 'owner', '')
end
return 1
