#!lua flags=allow-oom
-- Write how far a batch is, by the gateway that runs it.
--
-- KEYS  batch         hash   the batch
--       open_batches  zset   all open batches
--       tenant_open   set    its tenant's open batches
-- ARGV  id            str    id of the batch
--       tenant        str    its tenant
--       epoch         int    epoch under which the gateway runs it
--       record        bytes  `messages.Batch`, msgpack
--       outcome       str    '1': it has ended; '0': nobody runs it any more, and the next gateway may; '': it goes on
--       status        str    its status
--       wait_ms       int    ms until the next gateway may run it, where nobody does any more; 0: it is the first of
--                            all that wait
--       tries         int | str  tries by which nothing more of it was answered; '': as it was
-- Reply: int, 1 when it is written, 0 when another gateway runs it by now, or it has ended.
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
  redis.call('ZADD', open_batches, wait_ms > 0 and now_ms() + wait_ms or -2^52, member)
  redis.call('HSET', batch, 'owner', '')
end
return 1
