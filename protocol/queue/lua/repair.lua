#!lua flags=allow-oom
-- Make a request's log at least as long as what a client has seen: Redis came back without the log's end.
--
-- KEYS[1]  string  prefix of the shard's keys
-- ARGV[1]  str     rid
-- ARGV[2]  int     index of the first id given, in tokens
-- ARGV[3]  bytes   token ids, int32 little endian
-- ARGV[4]  bytes   logprob records of these tokens; '' without them
-- ARGV[5]  int     bytes of a logprob record
-- Reply: int, the length of the log in tokens. It is unchanged when the log is longer, ends before the first id, or the
--        request is unknown.
local tok = P .. ':tok:' .. ARGV[1]
local len, seq0 = redis.call('STRLEN', tok) / 4, tonumber(ARGV[2])
local num = #ARGV[3] / 4
if redis.call('EXISTS', req_key(ARGV[1])) == 0 then return len end
if len >= seq0 and len < seq0 + num then
  local skip = len - seq0
  redis.call('APPEND', tok, string.sub(ARGV[3], skip * 4 + 1))
  local width = tonumber(ARGV[5])
  if #ARGV[4] > 0 then redis.call('APPEND', P .. ':lp:' .. ARGV[1], string.sub(ARGV[4], skip * width + 1)) end
  local ttl = redis.call('PTTL', req_key(ARGV[1]))
  if ttl > 0 then
    redis.call('PEXPIRE', tok, ttl)
    if #ARGV[4] > 0 then redis.call('PEXPIRE', P .. ':lp:' .. ARGV[1], ttl) end
  end
  len = seq0 + num
end
return len
