-- Ask for the end of a request. Queued: it ends here. Assigned: its worker is told, and its next step is refused.
-- KEYS: prefix
-- ARGV: rid, delta for the gateway, cancel order for the owner, ended message for the scheduler
-- -> the state after the call, or '' when the request is unknown
local rid, now = ARGV[1], now_ms()
local f = redis.call('HMGET', req_key(rid), 'state', 'owner', 'gateway')
if not f[1] then return '' end
if is_terminal(f[1]) then return f[1] end
redis.call('HSET', req_key(rid), 'cancel', 1)
if f[1] == 'queued' then
  drop_submit(rid)
  redis.call('HINCRBY', req_key(rid), 'epoch', 1)
  write_end(rid, 'cancelled', 'cancelled', '', now)
  tell_scheduler(ARGV[4])
  if f[3] ~= '' then redis.call('XADD', P .. ':out:' .. f[3], 'NOMKSTREAM', '*', 'b', ARGV[2]) end
  return 'cancelled'
end
disown(f[2], rid)
redis.call('XADD', P .. ':w:' .. f[2] .. ':ctl', 'NOMKSTREAM', 'MINID', '~', now - 300000, '*', 'b', ARGV[3])
return f[1]
