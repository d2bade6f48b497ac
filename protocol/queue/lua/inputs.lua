#!lua flags=no-writes,allow-oom
-- Read what a worker needs of the requests that it was assigned.
--
-- ARGV  rows...  list  per request: rid (str), call (str, the call's id), part (int, name of its own field in the hash
--                      of the call's bodies, see `calls.py`)
-- Reply: array, 4 values per request: the field 'common' and its own field (bytes; nil if missing), token log (bytes),
--        logprobs (bytes); the last two are '' if missing.
local first, found = 1, {}
for a = first, #ARGV, 3 do
  local rid, call, part = unpack(ARGV, a, a + 2)
  local body = redis.call('HMGET', body_key(call), 'common', part)
  local at = #found
  found[at + 1], found[at + 2] = body[1], body[2]
  found[at + 3] = redis.call('GET', P .. ':tok:' .. rid) or ''
  found[at + 4] = redis.call('GET', P .. ':lp:' .. rid) or ''
end
return found
