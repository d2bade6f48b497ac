#!lua flags=allow-oom
-- Forget a file.
--
-- KEYS[1]  string  prefix of the shard's keys
-- KEYS[2]  string  the file's record
-- KEYS[3]  zset    its tenant's files by creation time
-- KEYS[4]  hash    sizes of its tenant's files
-- KEYS[5]  zset    all files by the time when they expire
-- ARGV[1]  str     id of the file
-- ARGV[2]  str     its tenant
-- Reply: int, 1 if the tenant had it, else 0.
local num_bytes = redis.call('HGET', KEYS[4], ARGV[1])
redis.call('DEL', KEYS[2])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[5], ARGV[2] .. ':' .. ARGV[1])
if not num_bytes then return 0 end
redis.call('HDEL', KEYS[4], ARGV[1])
redis.call('HINCRBY', KEYS[4], 'sum', -num_bytes)
return 1
