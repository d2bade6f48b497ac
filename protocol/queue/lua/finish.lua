#!lua flags=allow-oom
-- End a request from outside its worker: its deadline has passed, or it was tried too often. Fences its owner.
--
-- KEYS[1]  string  prefix of the shard's keys
-- ARGV[1]  str     rid
-- ARGV[2]  str     state, a terminal one
-- ARGV[3]  str     `messages.FinishReason`
-- ARGV[4]  str     JSON of `messages.ErrorInfo`; '' without an error
-- ARGV[5]  bytes   list of one `messages.Delta`, msgpack, for the gateway
-- ARGV[6]  bytes   `messages.Control`, msgpack, for the owner
-- ARGV[7]  bytes   list of one `messages.Ended`, msgpack, for the scheduler
-- ARGV[8]  bytes   `messages.DeadLetter`, msgpack; '' for none. With one, the request's keys live for 7 days.
-- Reply: int. 1: it ends with this call. 0: it had ended, or is unknown.
local rid, now = ARGV[1], now_ms()
local f = redis.call('HMGET', req_key(rid), 'state', 'owner', 'gateway')
if not f[1] or is_terminal(f[1]) then return 0 end
drop_submit(rid)
redis.call('HINCRBY', req_key(rid), 'epoch', 1)
write_end(rid, ARGV[2], ARGV[3], ARGV[4], now, ARGV[8] ~= '')
tell_scheduler(ARGV[7])
if f[2] ~= '' then
  disown(f[2], rid)
  redis.call('XADD', P .. ':w:' .. f[2] .. ':ctl', 'NOMKSTREAM', 'MINID', '~', now - 300000, '*', 'b', ARGV[6])
end
if f[3] ~= '' then redis.call('XADD', P .. ':out:' .. f[3], 'NOMKSTREAM', '*', 'b', ARGV[5]) end
if ARGV[8] ~= '' then
  redis.call('XADD', P .. ':dlq', 'MINID', '~', now - 604800000, '*', 'b', ARGV[8])
  redis.call('XTRIM', P .. ':dlq', 'MAXLEN', 1024) -- `MAX_LETTERS` of dead_letters.py
  redis.call('EXPIRE', P .. ':dlq', 604800)
end
return 1
