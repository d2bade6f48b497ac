#!lua flags=allow-oom
-- Cancel a request. A queued one ends here. An assigned one is taken from its worker, which is notified and whose next
-- step is refused until it writes this end.
--
-- ARGV  rid     str    rid
--       deltas  bytes  list of one `messages.Delta`, msgpack, for the gateway
--       order   bytes  `messages.Control`, msgpack, for the owner
--       ended   bytes  list of one `messages.Ended`, msgpack, for the scheduler
-- Reply: str, the request's state after the call; '' if the request is unknown.
local rid, deltas, order, ended = unpack(ARGV)
local now = now_ms()
local f = redis.call('HMGET', req_key(rid), 'state', 'owner', 'gateway', 'cancel')
if not f[1] then return '' end
-- A repeated call has no effect: the order was already sent.
if is_terminal(f[1]) or f[4] == '1' then return f[1] end
redis.call('HSET', req_key(rid), 'cancel', 1)
if f[1] == 'queued' then
  drop_submit(rid)
  redis.call('HINCRBY', req_key(rid), 'epoch', 1)
  write_end(rid, 'cancelled', 'cancelled', '', now)
  tell_scheduler(ended)
  if f[3] ~= '' then redis.call('XADD', P .. ':out:' .. f[3], 'NOMKSTREAM', '*', 'b', deltas) end
  return 'cancelled'
end
disown(f[2], rid)
redis.call('XADD', P .. ':w:' .. f[2] .. ':ctl', 'NOMKSTREAM', 'MINID', '~', now - 300000, '*', 'b', order)
return f[1]
