#!lua flags=allow-oom
-- Take requests from a worker that died or drains, and queue them again with their tokens kept. Fences the worker.
--
-- A death counts as a failed attempt of those requests that had made no progress: the request that kills workers kills
-- the next one at the same token, while its neighbors advance. Deaths with progress end a request too, at four times
-- that number.
--
-- ARGV  wid           str  id of the worker
--       has_died      int  1 if the worker died, else 0
--       name          str  name of the worker
--       max_attempts  int  maximum attempts of a request
--       rids...       str  of the requests
-- Reply: array of str, 2 values per request: rid, outcome. Outcomes: requeued; exhausted and cancelled, which are left
--        for `finish`; other: the request no longer belongs to this worker.
-- The request's field `left:<slot>` has when and how it left the worker: unix ms, a space, `died` or `handed back`.
-- The request's field `lost` has one JSON line per death, a `messages.Death`.
local wid, has_died, name, max_attempts = unpack(ARGV, 1, 4)
has_died, max_attempts = has_died == '1', tonumber(max_attempts)
local first, now, out = 5, now_ms(), {}
for a = first, #ARGV do
  local rid = ARGV[a]
  local key = req_key(rid)
  local f = redis.call('HMGET', key, 'state', 'owner', 'cancel', 'attempts', 'cls', 'sub', 'start', 'lost', 't_assign')
  local outcome = 'other'
  if f[1] == 'assigned' and f[2] == wid then
    local attempts, lost = tonumber(f[4]), f[8] or ''
    if has_died then
      local length, start = redis.call('STRLEN', P .. ':tok:' .. rid) / 4, tonumber(f[7] or '0')
      if length <= start then attempts = attempts + 1 end
      lost = lost .. cjson.encode({wid, name, now, tonumber(f[9] or '0'), length, start}) .. '\n'
    end
    local _, num_lost = string.gsub(lost, '\n', '')
    disown(wid, rid)
    local epoch = redis.call('HINCRBY', key, 'epoch', 1)
    redis.call('HSET', key, 'attempts', attempts, 'lost', lost, 'left:' .. note_slot(epoch - 1),
      now .. (has_died and ' died' or ' handed back'))
    if f[3] == '1' then outcome = 'cancelled'
    elseif attempts >= max_attempts or num_lost >= 4 * max_attempts then outcome = 'exhausted'
    else
      local id = redis.call('XADD', P .. ':sub:' .. f[5], '*', 'b', f[6], 'e', epoch, 'a', attempts)
      redis.call('HSET', key, 'state', 'queued', 'owner', '', 'sub_id', id)
      outcome = 'requeued'
    end
  end
  out[#out + 1] = rid
  out[#out + 1] = outcome
end
return out
