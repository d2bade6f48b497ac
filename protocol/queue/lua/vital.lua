#!lua flags=allow-oom
-- Run essential writes atomically, even while the server's memory is full: heartbeats, streams, orders.
--
-- ARGV  words...  str | bytes | int  per command: the number of its words (int), then its words
-- Reply: array, the reply of each command.
local first, replies = 1, {}
local a = first
while a <= #ARGV do
  local last = a + ARGV[a]
  replies[#replies + 1] = redis.call(unpack(ARGV, a + 1, last))
  a = last + 1
end
return replies
