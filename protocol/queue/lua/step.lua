#!lua flags=allow-oom
-- Make the tokens and ends of one engine step durable and visible: all of them, or none.
--
-- KEYS  work          stream  the worker's assignments
--       ended_stream  stream  ended requests, for the scheduler
--       own           hash    rid -> epoch of the requests that the worker may write
-- ARGV  rows          bytes   rows, one msgpack array, 4 values each: rid (str), epoch (str), seq0 (int, tokens), size
--                             (int, bytes). One packed argument costs the server less than hundreds of arguments.
--       ids           bytes   token ids of all rows, int32 little endian, one row after the other
--       num_logprobs  int     number of logprob groups
--       num_ends      int     number of end groups
--       num_notes     int     number of notes
--       num_outs      int     number of delivery groups
--       ended         bytes   list of `messages.Ended`, msgpack; '' for none
--       logprobs...   list    rid (str), seq0 (int | str, tokens, or 'prompt'), records (bytes)
--       ends...       list    rid (str), state (str), finish (str), error (str, JSON), cached (int, tokens of its
--                             prompt found in the prefix cache). Each has a row, perhaps without tokens.
--       notes...      list    rid (str), field (str, of its hash), timing (bytes, `messages.Timing`, msgpack)
--       outs...       list    gateway (str), deltas (bytes, list of `messages.Delta`, msgpack)
--       done...       bytes   stream ids of assignments whose last request ends in this step
-- Reply: array. Empty: everything was written. Otherwise nothing was, and each row that cannot be written is named in
--        four values: rid (str), code (str), epoch (int), length of the log (int, tokens).
--        Codes: missing | terminal | stale (another epoch) | cancelled | length (the log does not end at seq0).
--        An error if rows contradict each other, such as two for the same request and position.
local work, ended_stream, own = unpack(KEYS, 2)
local rows, ids, num_logprobs, num_ends, num_notes, num_outs, ended = unpack(ARGV, 1, 7)
local call, tok = redis.call, P .. ':tok:'
rows = cmsgpack.unpack(rows)
local first = 8
local first_end = first + num_logprobs * 3
local first_note = first_end + num_ends * 5
local first_out = first_note + num_notes * 3
local first_done = first_out + num_outs * 2

-- Return whether the worker may write every row, by its hash of owned requests alone: one command for all rows. That
-- hash outlives a request that has expired, so a row without tokens also checks that its request exists.
local function owns_all()
  if #rows == 0 then return true end
  local rids = {}
  for a = 1, #rows, 4 do rids[#rids + 1] = rows[a] end
  local epochs = call('HMGET', own, unpack(rids))
  for i, rid in ipairs(rids) do
    local a = i * 4 - 3
    if epochs[i] ~= rows[a + 1] then return false end
    if rows[a + 2] == 0 and call('EXISTS', req_key(rid)) == 0 then return false end
  end
  return true
end

-- Remove the last `size` bytes of a log.
local function cut(key, size)
  local log = call('GET', key)
  if #log > size then call('SET', key, string.sub(log, 1, #log - size), 'KEEPTTL') else call('DEL', key) end
end

-- Append every row to its request's log, or none if a log does not end where its row begins. Return whether they were
-- appended. APPEND returns the new length, so a row costs one command; a wrong length is rare, and the appended bytes
-- are then removed.
local function append_all()
  local at = 1
  for a = 1, #rows, 4 do
    local key, size = tok .. rows[a], rows[a + 3]
    local len = size > 0 and call('APPEND', key, string.sub(ids, at, at + size - 1)) or call('STRLEN', key)
    at = at + size
    if len ~= rows[a + 2] * 4 + size then
      for b = a, 1, -4 do
        if rows[b + 3] > 0 then cut(tok .. rows[b], rows[b + 3]) end
      end
      return false
    end
  end
  return true
end

-- Check each request itself and return the refused rows with their codes, as in the reply.
local function refused()
  local bad, ending = {}, {}
  for a = first_end, first_note - 5, 5 do
    local rid, state = unpack(ARGV, a, a + 4)
    ending[rid] = state
  end
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

if not (owns_all() and append_all()) then
  local bad = refused()
  if #bad > 0 then return bad end
  -- The hash of owned requests has expired, or the step ends a cancelled request: the requests themselves allow the
  -- rows.
  if not append_all() then return redis.error_reply('the rows of a step contradict each other') end
end

for a = first, first_end - 3, 3 do
  local rid, seq0, records = unpack(ARGV, a, a + 2)
  if seq0 == 'prompt' then
    local ttl = call('PTTL', req_key(rid))
    if ttl > 0 then call('SET', P .. ':plp:' .. rid, records, 'PX', ttl) end
  else
    call('APPEND', P .. ':lp:' .. rid, records)
  end
end
-- An ended request gets all its fields in one command, and then a TTL for all its keys.
local now, more = now_ms(), {}
for a = first_end, first_note - 5, 5 do
  local rid, _, _, _, cached = unpack(ARGV, a, a + 4)
  more[rid] = cached ~= '0' and {'cached', cached} or {}
end
for a = 1, #rows, 4 do
  local rid = rows[a]
  if rows[a + 2] == 0 and rows[a + 3] > 0 then
    local fields = more[rid]
    if fields then
      fields[#fields + 1] = 't_first'
      fields[#fields + 1] = now
    else
      -- The first token created the log, which gets the remaining TTL of the request.
      call('HSET', req_key(rid), 't_first', now)
      local ttl = call('PTTL', req_key(rid))
      if ttl > 0 then call('PEXPIRE', tok .. rid, ttl) end
    end
  end
end
for a = first, first_end - 3, 3 do
  local rid, seq0 = unpack(ARGV, a, a + 2)
  if seq0 == '0' and not more[rid] then
    local ttl = call('PTTL', req_key(rid))
    if ttl > 0 then call('PEXPIRE', P .. ':lp:' .. rid, ttl) end
  end
end
for a = first_note, first_out - 3, 3 do
  local rid, field, timing = unpack(ARGV, a, a + 2)
  local fields = more[rid]
  if fields then
    fields[#fields + 1] = field
    fields[#fields + 1] = timing
  -- A request that has expired in between must not be created again, since it would have no TTL.
  elseif call('EXISTS', req_key(rid)) == 1 then
    call('HSET', req_key(rid), field, timing)
  end
end
for a = first_end, first_note - 5, 5 do
  local rid, state, finish, error = unpack(ARGV, a, a + 4)
  call('HDEL', own, rid)
  write_end(rid, state, finish, error, now, false, unpack(more[rid]))
end
for a = first_out, first_done - 2, 2 do
  local gateway, deltas = unpack(ARGV, a, a + 1)
  -- NOMKSTREAM: the stream of a dead gateway must not be created again, since it would have no TTL.
  call('XADD', P .. ':out:' .. gateway, 'NOMKSTREAM', '*', 'b', deltas)
end
for a = first_done, #ARGV do call('XDEL', work, ARGV[a]) end
if ended ~= '' then call('XADD', ended_stream, 'MAXLEN', '~', '10000', '*', 'b', ended) end
return {}
