#!lua flags=allow-oom,no-writes
-- Count the requests of the same class that were submitted before a queued one.
--
-- ARGV  rid    str  rid
--       limit  int  maximum number to count
-- Reply: int, that number, at most `limit`; -1 if the request is not queued.
local rid, limit = unpack(ARGV)
local f = redis.call('HMGET', req_key(rid), 'state', 'cls', 'sub_id')
if f[1] ~= 'queued' or not f[3] or f[3] == '' then return -1 end
return #redis.call('XRANGE', P .. ':sub:' .. f[2], '-', '(' .. f[3], 'COUNT', limit)
