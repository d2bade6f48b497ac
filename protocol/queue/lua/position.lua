-- Tell how many requests were submitted to the same class before a queued one.
-- KEYS: prefix
-- ARGV: rid, largest number worth counting
-- -> count, or -1 when the request is not queued
local f = redis.call('HMGET', req_key(ARGV[1]), 'state', 'cls', 'sub_id')
if f[1] ~= 'queued' or not f[3] or f[3] == '' then return -1 end
return #redis.call('XRANGE', P .. ':sub:' .. f[2], '-', '(' .. f[3], 'COUNT', ARGV[2])
