#!lua flags=allow-oom
-- Run writes that the fleet lives by, all at once, also when the server's memory is full: beats, streams, orders.
--
-- KEYS[1]    string  prefix of the shard's keys
-- ARGV[1...]         per command: number of its words (int), then its words
-- Reply: array, the reply of each command.
local replies, a = {}, 1
while a <= #ARGV do
  local last = a + ARGV[a]
  replies[#replies + 1] = redis.call(unpack(ARGV, a + 1, last))
  a = last + 1
end
return replies
