#!lua
-- Take a batch, for any gateway to run.
--
-- KEYS[1]  string  prefix of the shard's keys
-- KEYS[2]  hash    the batch
-- KEYS[3]  zset    its tenant's batches by creation time
-- KEYS[4]  zset    all open batches
-- KEYS[5]  set     its tenant's open batches
-- ARGV[1]  str     id of the batch
-- ARGV[2]  str     its tenant
-- ARGV[3]  bytes   `messages.Batch`, msgpack
-- ARGV[4]  int     unix ms when it was made
-- ARGV[5]  int     ms that its record lives
-- ARGV[6]  int     most open batches of its tenant
-- Reply: int, -1 when it is taken, also when it is known: an earlier reply was lost; else the tenant's open batches.
if redis.call('EXISTS', KEYS[2]) == 1 then return -1 end
local num = redis.call('SCARD', KEYS[5])
if num >= tonumber(ARGV[6]) then return num end
redis.call('HSET', KEYS[2], 'b', ARGV[3], 'epoch', 0, 'owner', '')
redis.call('ZADD', KEYS[3], ARGV[4], ARGV[1])
-- By how many its tenant has open, then by age: everybody's first one comes before anybody's second. Below zero, which
-- no time is; both fit a double's 53 bits.
redis.call('ZADD', KEYS[4], -2^52 + math.min(num, 255) * 2^42 + tonumber(ARGV[4]), ARGV[2] .. ':' .. ARGV[1])
redis.call('SADD', KEYS[5], ARGV[1])
for _, key in ipairs({KEYS[2], KEYS[3], KEYS[5]}) do redis.call('PEXPIRE', key, ARGV[5]) end
return -1
