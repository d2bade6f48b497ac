#!lua flags=allow-oom,no-writes
-- Count the requests of the same class that were submitted before a queued one.
--
-- KEYS[1]  string  prefix of the shard's keys
-- ARGV[1]  str     rid
-- ARGV[2]  int     largest number worth counting
-- Reply: int, that number, at most ARGV[2]; -1 when the request is not queued.
local f = redis.call('HMGET', req_key(ARGV[1]), 'state', 'cls', 'sub_id')
if f[1] ~= 'queued' or not f[3] or f[3] == '' then return -1 end
return #redis.call('XRANGE', P .. ':sub:' .. f[2], '-', '(' .. f[3], 'COUNT', ARGV[2])
