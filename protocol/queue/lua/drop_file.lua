#!lua flags=allow-oom
-- Delete the record of a file.
--
-- KEYS  file    string  the file's record
--       files   zset    its tenant's files by creation time
--       sizes   hash    sizes of its tenant's files
--       expiry  zset    all files by time of expiry
-- ARGV  id      str     id of the file
--       tenant  str     its tenant
-- Reply: int, 1 if the tenant had the file, else 0.
local file, files, sizes, expiry = unpack(KEYS, 2)
local id, tenant = unpack(ARGV)
local num_bytes = redis.call('HGET', sizes, id)
redis.call('DEL', file)
redis.call('ZREM', files, id)
redis.call('ZREM', expiry, tenant .. ':' .. id)
if not num_bytes then return 0 end
redis.call('HDEL', sizes, id)
redis.call('HINCRBY', sizes, 'sum', -num_bytes)
return 1
