#!lua flags=no-writes,allow-oom
-- Read what a worker needs of the requests that it was assigned.
--
-- KEYS[1]  string  prefix of the shard's keys
-- ARGV[1...]       per request, 3 values: rid (str), id of its call (str), name of its own field of the call's bodies
--                  (str), see `calls.py`
-- Reply: array, per request 4 values: the field 'common' and its own (bytes; nil: there is none), token log (bytes),
--        logprobs (bytes), both '' if there is none.
local found = {}
for i = 1, #ARGV, 3 do
  local body = redis.call('HMGET', body_key(ARGV[i + 1]), 'common', ARGV[i + 2])
  local at = #found
  found[at + 1], found[at + 2] = body[1], body[2]
  found[at + 3] = redis.call('GET', P .. ':tok:' .. ARGV[i]) or ''
  found[at + 4] = redis.call('GET', P .. ':lp:' .. ARGV[i]) or ''
end
return found
