#!lua flags=allow-oom
-- Write how far a batch is, by the gateway that runs it.
--
-- KEYS[1]  string  prefix of the shard's keys
-- KEYS[2]  hash    the batch
-- KEYS[3]  zset    all open batches
-- KEYS[4]  set     its tenant's open batches
-- ARGV[1]  str     id of the batch
-- ARGV[2]  str     its tenant
-- ARGV[3]  int     epoch under which the gateway runs it
-- ARGV[4]  bytes   `messages.Batch`, msgpack
-- ARGV[5]  str     '1': it has ended; '0': nobody runs it any more, and the next gateway may; '': it goes on
-- ARGV[6]  str     its status
-- ARGV[7]  int     ms until the next gateway may run it, where nobody does any more; 0: it is the first of all that wait
-- ARGV[8]  int     tries by which nothing more of it was answered; '': as it was
-- Reply: int, 1 when it is written, 0 when another gateway runs it by now, or it has ended.
local member = ARGV[2] .. ':' .. ARGV[1]
if not redis.call('ZSCORE', KEYS[3], member) then return 0 end
if redis.call('HGET', KEYS[2], 'epoch') ~= ARGV[3] then return 0 end
redis.call('HSET', KEYS[2], 'b', ARGV[4])
if ARGV[8] ~= '' then redis.call('HSET', KEYS[2], 'tries', ARGV[8]) end
if ARGV[5] == '1' then
  redis.call('ZREM', KEYS[3], member)
  redis.call('SREM', KEYS[4], ARGV[1])
  tell_end(ARGV[2], ARGV[1], 'batch.' .. ARGV[6])
elseif ARGV[5] == '0' then
  local wait_ms = tonumber(ARGV[7])
  redis.call('ZADD', KEYS[3], wait_ms > 0 and now_ms() + wait_ms or -2^52, member)
  redis.call('HSET', KEYS[2], 'owner', '')
end
return 1
