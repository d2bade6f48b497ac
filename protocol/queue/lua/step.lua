-- Make one engine step's tokens and endings durable and visible: all of them, or nothing.
-- KEYS: prefix, work stream, ended stream, what the worker owns, its journal
-- ARGV: rows to look at as one packed table (cheaper than hundreds of arguments): rid, epoch, seq0, bytes of ids, rid, ...
--   what they write as one packed table: bytes of a tail, for each; tails and ids, one after the other. A tail is what
--   the journal may hold of a request, just before its ids
--   rows that only go on with what the worker was found to own, packed as the first; their ids, one after the other
--   num logprobs, num ends, num outs, ended message or '', version of what the worker owns at which it was found to
--   own it or '', 1 to empty the journal else 0, then
--   per logprobs: rid, seq0 or 'prompt', records
--   per end: rid, state, finish, error; each has a row to look at, maybe without ids
--   per out: gateway id, packed deltas
--   then the ids of work entries whose last request this step ends
-- -> {version that the rows have now been checked at, or ''} | {'', rid, code, epoch, len, ...}, code: missing | terminal | stale | cancelled | length
local call, tok, unpack_table = redis.call, P .. ':tok:', cmsgpack.unpack
local first_lp = 12
local first_end = first_lp + ARGV[6] * 3
local first_out = first_end + ARGV[7] * 4
local first_done = first_out + ARGV[8] * 2

-- While nothing was taken from the worker, rows that go on need no look, and their tokens are put down in its journal.
local version = call('HGET', KEYS[4], '') or ''
local is_known = version ~= '' and ARGV[10] == version
if ARGV[11] == '1' or not is_known then merge_journal(KEYS[5]) end

local rows = {}  -- {rid, epoch, seq0, bytes of the tail, tail and ids}
local function take(packed, tails, ids)
  local at = 1
  for a = 1, #packed, 4 do
    local tail = tails[(a + 3) / 4] or 0
    local size = tail + packed[a + 3]
    rows[#rows + 1] = {packed[a], packed[a + 1], packed[a + 2], tail, string.sub(ids, at, at + size - 1)}
    at = at + size
  end
end
take(unpack_table(ARGV[1]), unpack_table(ARGV[2]), ARGV[3])
local journaled = ARGV[4]
if not is_known then
  take(unpack_table(journaled), {}, ARGV[5])
  journaled = ''
end

-- Look at each request itself, and say what is wrong with whose.
local function refused()
  local bad, ending = {''}, {}
  for a = first_end, first_out - 4, 4 do ending[ARGV[a]] = ARGV[a + 1] end
  for _, row in ipairs(rows) do
    local rid = row[1]
    local f = call('HMGET', req_key(rid), 'epoch', 'cancel', 'state')
    local len, code = call('STRLEN', tok .. rid) / 4, nil
    if not f[1] then code = 'missing'
    elseif is_terminal(f[3]) then code = 'terminal'
    elseif f[1] ~= row[2] then code = 'stale'
    elseif f[2] == '1' and ending[rid] ~= 'cancelled' then code = 'cancelled'
    elseif len ~= row[3] then code = 'length' end
    if code then
      bad[#bad + 1] = rid
      bad[#bad + 1] = code
      bad[#bad + 1] = tonumber(f[1] or '0')
      bad[#bad + 1] = len
    end
  end
  return bad
end

-- Tell whether the worker owns every row's request, at its epoch. A request without a log may have expired.
local function owns_all()
  if #rows == 0 then return true end
  local rids = {}
  for i, row in ipairs(rows) do rids[i] = row[1] end
  local epochs = call('HMGET', KEYS[4], unpack(rids))
  for i, row in ipairs(rows) do
    if epochs[i] ~= row[2] or row[3] == 0 and call('EXISTS', req_key(row[1])) == 0 then return false end
  end
  return true
end

-- Append every row, or none if a log is not as long as its row believes; tell whether they are written.
local function append_all()
  local written = {}
  for i, row in ipairs(rows) do
    local key, ids, len = tok .. row[1], row[5], nil
    if row[4] > 0 then  -- as much of the tail as the log lacks
      local lacks = row[3] * 4 - call('STRLEN', key)
      ids = 0 <= lacks and lacks <= row[4] and string.sub(ids, row[4] - lacks + 1) or ''
    end
    if #ids > 0 then len = call('APPEND', key, ids) else len = call('STRLEN', key) end
    written[i] = #ids
    if len ~= row[3] * 4 + #row[5] - row[4] then
      for j = 1, i do
        if written[j] > 0 then
          local log = call('GET', tok .. rows[j][1])
          if #log > written[j] then call('SET', tok .. rows[j][1], string.sub(log, 1, #log - written[j]), 'KEEPTTL')
          else call('DEL', tok .. rows[j][1]) end
        end
      end
      return false
    end
  end
  return true
end

if not (owns_all() and append_all()) then
  merge_journal(KEYS[5])
  local bad = refused()
  if #bad > 1 then return bad end
  append_all()  -- every log is as long as its row believes
end
if #journaled > 1 and call('RPUSH', KEYS[5], journaled, ARGV[5]) == 2 then call('EXPIRE', KEYS[5], 3600) end

for a = first_lp, first_end - 3, 3 do
  if ARGV[a + 1] == 'prompt' then
    local ttl = call('PTTL', req_key(ARGV[a]))
    if ttl > 0 then call('SET', P .. ':plp:' .. ARGV[a], ARGV[a + 2], 'PX', ttl) end
  else
    call('APPEND', P .. ':lp:' .. ARGV[a], ARGV[a + 2])
  end
end
local now = now_ms()
for _, row in ipairs(rows) do
  if row[3] == 0 and #row[5] > 0 then
    -- The first token: the log takes over the request's life time.
    call('HSET', req_key(row[1]), 't_first', now)
    local ttl = call('PTTL', req_key(row[1]))
    if ttl > 0 then call('PEXPIRE', tok .. row[1], ttl) end
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
if ARGV[9] ~= '' then call('XADD', KEYS[3], 'MAXLEN', '~', '10000', '*', 'b', ARGV[9]) end
return {version}
