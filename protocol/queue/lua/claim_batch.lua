#!lua flags=allow-oom
-- Let a gateway run a batch that nobody runs, or go on with one that it runs.
--
-- KEYS[1]  string  prefix of the shard's keys
-- KEYS[2]  hash    the batch
-- KEYS[3]  zset    all open batches
-- ARGV[1]  str     id of the batch
-- ARGV[2]  str     its tenant
-- ARGV[3]  str     the gateway
-- ARGV[4]  int     ms for which it is the gateway's without another call
-- Reply: array. {epoch (int), unix ms when the batch was cancelled or 0 (int), `messages.Batch` (bytes), tries by which
--        nothing more of it was answered (int)}; {} when it is another's, or has ended.
local member, now = ARGV[2] .. ':' .. ARGV[1], now_ms()
local until_ms = redis.call('ZSCORE', KEYS[3], member)
if not until_ms then return {} end
local f = redis.call('HMGET', KEYS[2], 'b', 'owner', 'epoch', 'cancel', 'tries')
if not f[1] then
  redis.call('ZREM', KEYS[3], member)
  return {}
end
local is_mine = f[2] == ARGV[3] and tonumber(until_ms) > 0
if not is_mine and tonumber(until_ms) > now then return {} end
local epoch, tries = tonumber(f[3] or 0), tonumber(f[5] or 0)
if not is_mine then
  -- Its gateway has fallen silent: what it does may be what ends gateways.
  if f[2] and f[2] ~= '' then tries = redis.call('HINCRBY', KEYS[2], 'tries', 1) end
  epoch = redis.call('HINCRBY', KEYS[2], 'epoch', 1)
  redis.call('HSET', KEYS[2], 'owner', ARGV[3])
end
redis.call('ZADD', KEYS[3], now + ARGV[4], member)
return {epoch, tonumber(f[4] or 0), f[1], tries}
