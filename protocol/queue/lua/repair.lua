#!lua flags=allow-oom
-- Make a request's log at least as long as what a client has seen: Redis came back without the log's end.
--
-- ARGV  rid           str    rid
--       seq0          int    index of the first id given, in tokens
--       ids           bytes  token ids, int32 little endian
--       logprobs      bytes  logprob records of these tokens; '' without them
--       record_bytes  int    bytes of a logprob record
-- Reply: int, the length of the log in tokens. The log is not changed if it is longer or ends before the first id, or
--        if the request is unknown.
local rid, seq0, ids, logprobs, record_bytes = unpack(ARGV)
local tok = P .. ':tok:' .. rid
local len, num = redis.call('STRLEN', tok) / 4, #ids / 4
seq0, record_bytes = tonumber(seq0), tonumber(record_bytes)
if redis.call('EXISTS', req_key(rid)) == 0 then return len end
if len >= seq0 and len < seq0 + num then
  local skip = len - seq0
  redis.call('APPEND', tok, string.sub(ids, skip * 4 + 1))
  if #logprobs > 0 then redis.call('APPEND', P .. ':lp:' .. rid, string.sub(logprobs, skip * record_bytes + 1)) end
  local ttl = redis.call('PTTL', req_key(rid))
  if ttl > 0 then
    redis.call('PEXPIRE', tok, ttl)
    if #logprobs > 0 then redis.call('PEXPIRE', P .. ':lp:' .. rid, ttl) end
  end
  len = seq0 + num
end
return len
