#!lua flags=allow-oom
-- End a request from outside its worker: its deadline has passed, or it was tried too often. Fences its owner.
--
-- ARGV  rid     str    rid
--       state   str    terminal state
--       reason  str    `messages.FinishReason`
--       error   str    JSON of `messages.ErrorInfo`; '' without an error
--       deltas  bytes  list of one `messages.Delta`, msgpack, for the gateway
--       order   bytes  `messages.Control`, msgpack, for the owner
--       ended   bytes  list of one `messages.Ended`, msgpack, for the scheduler
--       letter  bytes  `messages.DeadLetter`, msgpack; '' for none. With a letter, the request's keys live for 7 days.
-- Reply: int. 1: the request ends with this call. 0: it had already ended, or is unknown.
local rid, state, reason, error, deltas, order, ended, letter = unpack(ARGV)
local now = now_ms()
local f = redis.call('HMGET', req_key(rid), 'state', 'owner', 'gateway')
if not f[1] or is_terminal(f[1]) then return 0 end
drop_submit(rid)
redis.call('HINCRBY', req_key(rid), 'epoch', 1)
write_end(rid, state, reason, error, now, letter ~= '')
tell_scheduler(ended)
if f[2] ~= '' then
  disown(f[2], rid)
  redis.call('XADD', P .. ':w:' .. f[2] .. ':ctl', 'NOMKSTREAM', 'MINID', '~', now - 300000, '*', 'b', order)
end
if f[3] ~= '' then redis.call('XADD', P .. ':out:' .. f[3], 'NOMKSTREAM', '*', 'b', deltas) end
if letter ~= '' then
  redis.call('XADD', P .. ':dlq', 'MINID', '~', now - 604800000, '*', 'b', letter)
  redis.call('XTRIM', P .. ':dlq', 'MAXLEN', 1024) -- `MAX_LETTERS` of dead_letters.py
  redis.call('EXPIRE', P .. ':dlq', 604800)
end
return 1
