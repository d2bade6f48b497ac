-- End a request from outside its worker (deadline, cancel while queued, too many attempts). Fences the owner.
-- KEYS: prefix
-- ARGV: rid, state, finish, error, delta for the gateway, cancel order for the owner, ended message for the scheduler,
--       dead letter or ''
-- -> 1 | 0 when it had already ended or is unknown
local rid, now = ARGV[1], now_ms()
local f = redis.call('HMGET', req_key(rid), 'state', 'owner', 'gateway')
if not f[1] or is_terminal(f[1]) then return 0 end
drop_submit(rid)
redis.call('HINCRBY', req_key(rid), 'epoch', 1)
write_end(rid, ARGV[2], ARGV[3], ARGV[4], now)
tell_scheduler(ARGV[7])
if f[2] ~= '' then
  disown(f[2], rid)
  redis.call('XADD', P .. ':w:' .. f[2] .. ':ctl', 'NOMKSTREAM', 'MINID', '~', now - 300000, '*', 'b', ARGV[6])
end
if f[3] ~= '' then redis.call('XADD', P .. ':out:' .. f[3], 'NOMKSTREAM', '*', 'b', ARGV[5]) end
if ARGV[8] ~= '' then
  redis.call('XADD', P .. ':dlq', 'MINID', '~', now - 604800000, '*', 'b', ARGV[8])
  redis.call('EXPIRE', P .. ':dlq', 604800)
  for _, kind in ipairs(request_kinds) do redis.call('EXPIRE', P .. kind .. rid, 604800) end  -- to be retried
end
return 1
