-- Make one engine step's tokens and endings durable and visible: all of them, or nothing.
-- KEYS: prefix, work stream, ended stream, what the worker owns
-- ARGV: rows as one packed table (cheaper than hundreds of arguments): rid, epoch, seq0, bytes of ids, rid, ...; the
--   rows' ids, one after the other; num logprobs, num ends, num outs, ended message or '', version of what the worker
--   owns at which it was found to own all rows but the first N or '', N, then
--   per logprobs: rid, seq0 or 'prompt', records
--   per end: rid, state, finish, error; each has a row, maybe without ids
--   per out: gateway id, packed deltas
--   then the ids of work entries whose last request this step ends
-- -> {version that the rows have now been checked at, or ''} | {'', rid, code, epoch, len, ...}, code: missing | terminal | stale | cancelled | length
local call, tok, rows, all_ids = redis.call, P .. ':tok:', cmsgpack.unpack(ARGV[1]), ARGV[2]
local first_lp = 9
local first_end = first_lp + ARGV[3] * 3
local first_out = first_end + ARGV[4] * 4
local first_done = first_out + ARGV[5] * 2

-- Look at each request itself, and say what is wrong with whose.
local function refused()
  local bad, ending = {''}, {}
  for a = first_end, first_out - 4, 4 do ending[ARGV[a]] = ARGV[a + 1] end
  for a = 1, #rows, 4 do
    local rid, epoch, seq0 = rows[a], rows[a + 1], rows[a + 2]
    local f = call('HMGET', req_key(rid), 'epoch', 'cancel', 'state')
    local len, code = call('STRLEN', tok .. rid) / 4, nil
    if not f[1] then code = 'missing'
    elseif is_terminal(f[3]) then code = 'terminal'
    elseif f[1] ~= epoch then code = 'stale'
    elseif f[2] == '1' and ending[rid] ~= 'cancelled' then code = 'cancelled'
    elseif len ~= seq0 then code = 'length' end
    if code then
      bad[#bad + 1] = rid
      bad[#bad + 1] = code
      bad[#bad + 1] = tonumber(f[1] or '0')
      bad[#bad + 1] = len
    end
  end
  return bad
end

-- Tell whether the worker owns every row's request, at its epoch. Nearly always; then nothing else needs a look.
-- A request without a log may have expired.
local version = call('HGET', KEYS[4], '') or ''
local function owns_all()
  local rids = {}
  local num = version ~= '' and ARGV[7] == version and ARGV[8] or #rows / 4
  for a = 1, num * 4, 4 do rids[#rids + 1] = rows[a] end
  if #rids == 0 then return true end
  local epochs = call('HMGET', KEYS[4], unpack(rids))
  for i, rid in ipairs(rids) do
    local a = i * 4 - 3
    if epochs[i] ~= rows[a + 1] or rows[a + 2] == 0 and call('EXISTS', req_key(rid)) == 0 then return false end
  end
  return true
end

-- Append every row, or none if a log is not as long as its row believes; tell whether they are written.
local function append_all()
  local at = 1
  for a = 1, #rows, 4 do
    local key, size = tok .. rows[a], rows[a + 3]
    local len = size > 0 and call('APPEND', key, string.sub(all_ids, at, at + size - 1)) or call('STRLEN', key)
    at = at + size
    if len ~= rows[a + 2] * 4 + size then
      for b = 1, a, 4 do
        local written = rows[b + 3]
        if written > 0 then
          local log = call('GET', tok .. rows[b])
          if #log > written then call('SET', tok .. rows[b], string.sub(log, 1, #log - written), 'KEEPTTL')
          else call('DEL', tok .. rows[b]) end
        end
      end
      return false
    end
  end
  return true
end

if not owns_all() then
  local bad = refused()
  if #bad > 1 then return bad end
end
if not append_all() then return refused() end

for a = first_lp, first_end - 3, 3 do
  if ARGV[a + 1] == 'prompt' then
    local ttl = call('PTTL', req_key(ARGV[a]))
    if ttl > 0 then call('SET', P .. ':plp:' .. ARGV[a], ARGV[a + 2], 'PX', ttl) end
  else
    call('APPEND', P .. ':lp:' .. ARGV[a], ARGV[a + 2])
  end
end
local now = now_ms()
for a = 1, #rows, 4 do
  if rows[a + 2] == 0 and rows[a + 3] > 0 then
    -- The first token: the log takes over the request's life time.
    call('HSET', req_key(rows[a]), 't_first', now)
    local ttl = call('PTTL', req_key(rows[a]))
    if ttl > 0 then call('PEXPIRE', tok .. rows[a], ttl) end
  end
end
for a = first_lp, first_end - 3, 3 do
  if ARGV[a + 1] == '0' then
    local ttl = call('PTTL', req_key(ARGV[a]))
    if ttl > 0 then call('PEXPIRE', P .. ':lp:' .. ARGV[a], ttl) end
  end
end
for a = first_end, first_out - 4, 4 do
  call('HDEL', KEYS[4], ARGV[a])
  write_end(ARGV[a], ARGV[a + 1], ARGV[a + 2], ARGV[a + 3], now)
end
for a = first_out, first_done - 2, 2 do
  -- NOMKSTREAM: a dead gateway's stream must not come back without a TTL.
  call('XADD', P .. ':out:' .. ARGV[a], 'NOMKSTREAM', '*', 'b', ARGV[a + 1])
end
for a = first_done, #ARGV do call('XDEL', KEYS[2], ARGV[a]) end
if ARGV[6] ~= '' then call('XADD', KEYS[3], 'MAXLEN', '~', '10000', '*', 'b', ARGV[6]) end
return {version}
