#!lua
-- Queue the request of a dead letter again, with its tokens kept. No gateway waits for it: its result is stored.
--
-- ARGV  letter       str    stream id of the dead letter
--       rid          str    rid
--       sub          bytes  `messages.RequestHead`, msgpack
--       deadline_ms  int    deadline, unix ms
-- Reply: str. 'ok'. 'gone': there is no such letter; it was retried, or has expired. 'expired': its request has.
local letter, rid, sub, deadline_ms = unpack(ARGV)
deadline_ms = tonumber(deadline_ms)
if #redis.call('XRANGE', P .. ':dlq', letter, letter) == 0 then return 'gone' end
local key, now = req_key(rid), now_ms()
local f = redis.call('HMGET', key, 'state', 'cls', 'call')
if f[1] ~= 'failed' or redis.call('EXISTS', body_key(f[3])) == 0 then return 'expired' end
local epoch = redis.call('HINCRBY', key, 'epoch', 1)
local id = redis.call('XADD', P .. ':sub:' .. f[2], '*', 'b', sub, 'e', epoch)
redis.call('HSET', key, 'state', 'queued', 'attempts', 0, 'lost', '', 'finish', '', 'error', '', 'owner', '',
  'cancel', 0, 'gateway', '', 'stored', 1, 'deadline', deadline_ms, 'sub', sub, 'sub_id', id, 't_submit', now, 't_end', '')
local to = math.max(deadline_ms, now) + 3600000
for _, kind in ipairs(request_kinds) do redis.call('PEXPIREAT', P .. kind .. rid, to) end
prolong(f[3], to)
redis.call('XDEL', P .. ':dlq', letter)
return 'ok'
