-- Make one engine step's tokens and endings durable and visible: all of them, or nothing.
-- KEYS: prefix, work stream, ended stream
-- ARGV: num rows, num outs, ended message or '', then
--   per row: rid, epoch, seq0, ids, logprobs, state ('' while running), finish, error
--   per out: gateway id, packed deltas
--   then the ids of work entries whose last request this step ends
-- -> {} | {rid, code, epoch, len, ...}, code: missing | terminal | stale | cancelled | length
local rows, outs = tonumber(ARGV[1]), tonumber(ARGV[2])
local bad = {}
for i = 0, rows - 1 do
  local a = 3 + i * 8
  local rid, epoch, seq0, state = ARGV[a + 1], ARGV[a + 2], tonumber(ARGV[a + 3]), ARGV[a + 6]
  local f = redis.call('HMGET', req_key(rid), 'epoch', 'cancel', 'state')
  local len, code = redis.call('STRLEN', P .. ':tok:' .. rid) / 4, nil
  if not f[1] then code = 'missing'
  elseif is_terminal(f[3]) then code = 'terminal'
  elseif f[1] ~= epoch then code = 'stale'
  elseif f[2] == '1' and state ~= 'cancelled' then code = 'cancelled'
  elseif len ~= seq0 then code = 'length' end
  if code then
    bad[#bad + 1] = rid
    bad[#bad + 1] = code
    bad[#bad + 1] = tonumber(f[1] or '0')
    bad[#bad + 1] = len
  end
end
if #bad > 0 then return bad end

local now = now_ms()
for i = 0, rows - 1 do
  local a = 3 + i * 8
  local rid, seq0, ids, lps, state = ARGV[a + 1], ARGV[a + 3], ARGV[a + 4], ARGV[a + 5], ARGV[a + 6]
  if #ids > 0 then
    redis.call('APPEND', P .. ':tok:' .. rid, ids)
    if #lps > 0 then redis.call('APPEND', P .. ':lp:' .. rid, lps) end
    if seq0 == '0' then
      -- The first token: the log takes over the request's life time.
      redis.call('HSET', req_key(rid), 't_first', now)
      local ttl = redis.call('PTTL', req_key(rid))
      if ttl > 0 then
        redis.call('PEXPIRE', P .. ':tok:' .. rid, ttl)
        if #lps > 0 then redis.call('PEXPIRE', P .. ':lp:' .. rid, ttl) end
      end
    end
  end
  if state ~= '' then write_end(rid, state, ARGV[a + 7], ARGV[a + 8], now) end
end
local a = 3 + rows * 8
for i = 0, outs - 1 do
  -- NOMKSTREAM: a dead gateway's stream must not come back without a TTL.
  redis.call('XADD', P .. ':out:' .. ARGV[a + i * 2 + 1], 'NOMKSTREAM', '*', 'b', ARGV[a + i * 2 + 2])
end
a = a + outs * 2
for i = a + 1, #ARGV do redis.call('XDEL', KEYS[2], ARGV[i]) end
if ARGV[3] ~= '' then redis.call('XADD', KEYS[3], 'MAXLEN', '~', '10000', '*', 'b', ARGV[3]) end
return {}
