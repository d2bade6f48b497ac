-- Code shared by all scripts; it is prepended to each.
-- KEYS[1] is a string in every script: the prefix of the shard's keys, "lf:{s}". A request's keys are built from it, so
-- all of them are in one hash slot.
-- The head of each script is its contract. It lists the other keys and the arguments in order, with types and units,
-- then the reply. A name with dots is a list, which comes after all other arguments. A list consists of groups, whose
-- fields are named, or of single words. Arguments arrive as strings; "int" is a decimal string. "ms" is unix time or a
-- duration in milliseconds. `signatures.py`, by which scripts are called, has the same names in the same order; a
-- script reads its keys and arguments by these names alone.
local P = KEYS[1]
local function req_key(rid) return P .. ':req:' .. rid end

-- Return the key of a hash rid -> epoch of the requests that a worker may write. They are exactly the requests that are
-- assigned to it at that epoch and not cancelled. Code that changes one of these facts must change this hash, too.
local function own_key(wid) return P .. ':w:' .. wid .. ':own' end

-- Revoke a worker's right to write a request: before an end from outside, a cancellation, or a change of owner.
local function disown(wid, rid) redis.call('HDEL', own_key(wid), rid) end

-- Return unix time in ms, by the server's clock.
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- Return unix time in ms with microseconds, so that tenants served within the same ms keep their order.
local function turn_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + t[2] / 1000
end

-- Return whether a state is terminal.
local function is_terminal(state)
  return state == 'completed' or state == 'failed' or state == 'cancelled'
end

-- Prefixes of the keys of a request.
local request_kinds = {':req:', ':tok:', ':lp:', ':plp:'}

-- Estimated bytes of a request besides its logs and messages: its hash, its entries in streams and sets, its key names.
local request_bytes = 2048

-- Return the slot for the notes of an assignment, by its epoch. The first eight and the last eight assignments keep
-- notes, in the fields placed:<slot> (`messages.Placed`), run:<slot> (`messages.Timing`), left:<slot> (see
-- `requeue.lua`).
local function note_slot(epoch)
  local number = math.floor((epoch + 1) / 2)
  return number <= 8 and number or 9 + (number - 9) % 8
end

-- Return the key of a call's hash; `call` is the id of its first request. Fields:
-- open: number of its requests that have not ended;
-- kept: bytes of its bodies, if they live as long as its requests' records;
-- job: `<tenant>:<id>` of a job whose end webhooks report.
-- Where the tenant's bytes are counted, also: who: the tenant; bytes: what the call counts for now; left: what its
-- ended requests leave; last: unix ms when the records of its job and Idempotency-Key expire, 0 without.
local function call_key(call) return P .. ':call:' .. call end

-- Return the key of a call's bodies, see `calls.py`. It lives as long as any request of the call may run.
local function body_key(call) return P .. ':body:' .. call end

-- Return the key of a tenant's use: a hash of two buckets that drain evenly over a minute. With ':run' appended, it is
-- the key of a sorted set of the tenant's running requests. A tenant's name has no colon, so two tenants never share a
-- key.
local function quota_key(tenant) return P .. ':q:' .. tenant end

-- Refund the tokens that a request has reserved from its tenant's bucket and not used. Deleting the field `quota`
-- ensures that this happens once. `output`: number of tokens in its log.
local function settle(rid, tenant, max_new, num_prefill, assigned, output)
  local key = quota_key(tenant)
  redis.call('HDEL', req_key(rid), 'quota')
  redis.call('ZREM', key .. ':run', rid)
  local unused = assigned and max_new - output or max_new + num_prefill
  -- A bucket that has expired is full again.
  if unused > 0 and redis.call('HEXISTS', key, 'tokens') == 1 then
    redis.call('HINCRBYFLOAT', key, 'tokens', -unused)
  end
end

-- The data that a tenant keeps in the queue is a sorted set of '<call>:<bytes>' by unix ms of expiry. The score of its
-- member 'sum' is minus the bytes of all others. Both change in one script, so they agree even after a loss of data. An
-- entry that nothing removes stops counting at its expiry.

-- Extend the life of a key to `to`, unix ms, if it would expire earlier.
local function live_until(key, to)
  local expires = redis.call('PEXPIRETIME', key)
  if expires ~= -2 and expires < to then redis.call('PEXPIREAT', key, to) end
end

-- Extend the life of what the requests of a call share to `to`, unix ms. Both keys always expire together, and some
-- users that end requests may not read bodies.
local function prolong(call, to)
  local expires = redis.call('PEXPIRETIME', call_key(call))
  if expires == -2 or expires >= to then return end
  redis.call('PEXPIREAT', call_key(call), to)
  redis.call('PEXPIREAT', body_key(call), to)
end

-- Count `bytes` of a call against its tenant until `to`, unix ms.
local function keep(tenant, call, bytes, to)
  local key = quota_key(tenant) .. ':kept'
  redis.call('ZADD', key, to, call .. ':' .. bytes)
  redis.call('ZINCRBY', key, -bytes, 'sum')
  live_until(key, to + 60000)
end

-- Stop counting the `bytes` of a call. They may have expired before.
local function give_back(tenant, call, bytes)
  local key = quota_key(tenant) .. ':kept'
  if redis.call('ZREM', key, call .. ':' .. bytes) == 1 then redis.call('ZINCRBY', key, bytes, 'sum') end
end

-- Return the bytes that a tenant keeps. One call removes at most 128 expired entries.
local function kept_bytes(tenant, now)
  local key = quota_key(tenant) .. ':kept'
  -- Not from 0: that is the score of 'sum' if nothing is kept.
  for _, entry in ipairs(redis.call('ZRANGEBYSCORE', key, '(0', now, 'LIMIT', 0, 128)) do
    redis.call('ZREM', key, entry)
    redis.call('ZINCRBY', key, string.match(entry, ':(%d+)$'), 'sum')
  end
  return -tonumber(redis.call('ZSCORE', key, 'sum') or 0)
end

-- Record the end of a job or a batch for the gateways that send webhooks. `type`: event type; '': a job, whose requests
-- determine it. Each tenant has its own stream, so no tenant's ends displace or delay those of another.
local function tell_end(tenant, id, type)
  redis.call('XADD', P .. ':ends:' .. tenant, 'MAXLEN', '~', '10000', '*', 'id', id, 'type', type)
  redis.call('ZADD', P .. ':ends', 'NX', now_ms(), tenant)
end

-- Record a call's end for webhooks if it is a job; `job` is `<tenant>:<id>`, or false.
local function tell_job(job)
  if not job then return end
  local tenant, id = string.match(job, '^([^:]*):(.*)$')
  tell_end(tenant, id, '')
end

-- Maximum rows of a tenant's usage per day; all further usage is counted in one more row, '[]'.
local usage_rows = 1000

-- Add a request that ends at `now`, ms, to its tenant's usage of that day (UTC): a hash of rows, each '<requests>
-- <prompt tokens> <cached ones of these> <output tokens>'. `usage`: the decoded field of that name, made by `usage.py`.
-- `made`: tokens in its log. `cached`: its prompt tokens found in the prefix cache. Nothing is counted with a retention
-- of 0 days, or if the request has neither completed nor made a token: at most its prompt was computed. `is_dead`: it
-- may be queued again, so its field becomes what would still have to be counted then.
local function count_usage(rid, usage, made, state, cached, now, is_dead)
  local calls, prompt, from, days, tenant, row = unpack(usage)
  if days == 0 then return end
  local output = from < 0 and 0 or math.max(made - from, 0)
  if output == 0 and state ~= 'completed' then return end
  if prompt == 0 then cached = 0 end
  local day = math.floor(now / 86400000)
  local key = P .. ':usage:' .. day .. ':' .. tenant
  local before, is_first, own = redis.call('HGET', key, row), false, row
  if not before then
    local num = redis.call('HLEN', key)
    is_first = num == 0
    if num >= usage_rows then
      row = '[]'
      before = redis.call('HGET', key, row)
    end
  end
  local a, b, c, d = string.match(before or '0 0 0 0', '(%d+) (%d+) (%d+) (%d+)')
  redis.call('HSET', key, row, string.format('%.0f %.0f %.0f %.0f', a + calls, b + prompt, c + cached, d + output))
  if is_first then
    local to, tenants = (day + days + 1) * 86400000, P .. ':usage:' .. day
    redis.call('SADD', tenants, tenant)
    redis.call('PEXPIREAT', tenants, to)
    redis.call('PEXPIREAT', key, to)
  end
  if is_dead then
    local rest = {0, 0, from + output, days, tenant, own}
    redis.call('HSET', req_key(rid), 'usage', cmsgpack.pack(rest))
  end
end

-- Record that a request of a call has ended and that its keys live for `ttl` more seconds. The last request deletes the
-- bodies, unless they are kept, and the tenant is then charged only for what is left. `is_stored`: a client may delete
-- that.
local function leave_call(rid, call, ttl, now, is_stored)
  local key = call_key(call)
  local f = redis.call('HMGET', key, 'open', 'who', 'bytes', 'left', 'last', 'job', 'kept')
  if not f[1] then return end
  local left = tonumber(f[4] or 0)
  if f[2] then
    left = left + request_bytes
    for _, kind in ipairs({':tok:', ':lp:', ':plp:'}) do left = left + redis.call('STRLEN', P .. kind .. rid) end
  end
  if f[1] ~= '1' then
    redis.call('HSET', key, 'open', f[1] - 1, 'left', left)
    return
  end
  if f[7] then
    redis.call('UNLINK', key)
    redis.call('EXPIRE', body_key(call), ttl)
    left = left + tonumber(f[7])
  else
    redis.call('UNLINK', key, body_key(call))
  end
  tell_job(f[6])
  if not f[2] then return end
  local to = math.max(now + ttl * 1000, tonumber(f[5]))
  give_back(f[2], call, f[3])
  keep(f[2], call, left, to)
  if is_stored then
    redis.call('HSET', key, 'who', f[2], 'bytes', left)
    redis.call('PEXPIREAT', key, to)
  end
end

-- Maximum number of ends in all histories together, shared equally by tenants, and maximum bytes of an error's message
-- in an entry: 200,000 entries are about 80 MB. Ends of the last ten seconds may exceed the number.
local history_entries, history_message = 200000, 300

-- Return an error, JSON of `messages.ErrorInfo`, for a history entry: a long one is reduced to the beginning of its
-- message, its kind and its code. Invalid JSON becomes an empty object, which readers report as unreadable.
local function short_error(error)
  if #error <= history_message then return error end
  local is_read, info = pcall(cjson.decode, error)
  if not is_read or type(info) ~= 'table' or type(info.message) ~= 'string' then return '{}' end
  local message, last = info.message, math.min(#info.message, history_message)
  while last < #message and string.find(string.sub(message, last + 1, last + 1), '[\128-\191]') do last = last - 1 end
  return cjson.encode({message = string.sub(message, 1, last), kind = info.kind, code = info.code})
end

-- Add a request that ends at `now`, ms, to its tenant's history, a stream of `messages.HistoryEntry`. `history`:
-- retention in ms, a space, and maximum number of entries, which the tenant's share of all may lower. `usage` and
-- `output`: `usage` and `made` of `count_usage`. `f`: the request's fields call, cls, epoch, n_prompt, cached,
-- attempts, t_submit, t_first and placed:1, as stored in its hash.
local function note_history(rid, history, usage, output, f, state, finish, error, now)
  local ms, max = string.match(history, '^(%d+) (%d+)$')
  local tenant, row = usage[5], usage[6]
  for i = 3, 8 do f[i] = tonumber(f[i] or 0) end
  -- The note of its last placement is a `messages.Placed`; the first of its options names the worker.
  local slot, placed = note_slot(f[3]), f[9]
  if slot > 1 then placed = redis.call('HGET', req_key(rid), 'placed:' .. slot) end
  local options = placed and cmsgpack.unpack(placed)[4] or {}
  local worker = options[1] and options[1][1] or ''
  local entry = cmsgpack.pack({rid, f[1], row, f[2], state, finish, short_error(error), worker, f[4], f[5], output, f[6],
    f[7], f[8], now})
  local all = P .. ':hist'
  local key = all .. ':' .. tenant
  redis.call('XADD', key, 'MAXLEN', '~', max, '*', 'b', entry)
  -- TTLs are renewed, and old or excess entries trimmed, only every ten seconds: at each end this would double its
  -- cost. It is not delayed by a gateway whose clock is fast, nor for a stream that may have expired since. A new
  -- stream gets its TTL at once.
  local since = now - tonumber(redis.call('ZSCORE', all, tenant) or 0)
  if since >= 0 and since < math.min(10000, ms) and redis.call('XLEN', key) > 1 then return end
  local num = math.max(redis.call('ZCARD', all), 1)
  max = math.max(1, math.min(tonumber(max), math.floor(history_entries / num)))
  redis.call('XTRIM', key, 'MAXLEN', '~', max)
  redis.call('XTRIM', key, 'MINID', '~', now - ms)
  redis.call('PEXPIRE', key, ms)
  redis.call('ZADD', all, now, tenant)
  redis.call('ZREMRANGEBYSCORE', all, '-inf', now - ms)
  redis.call('PEXPIRE', all, ms)
  -- A tenant without new ends keeps the larger share of a time with fewer tenants, until another tenant trims it here.
  local other = redis.call('ZRANGE', all, now % num, now % num)[1]
  if other then redis.call('XTRIM', all .. ':' .. other, 'MAXLEN', '~', max) end
end

-- Write the end of a request: its state, reason (`finish`), error and time (`now`, ms), and shorten the TTL of its
-- keys. `is_dead`: it may be retried for 7 days, so it stays in its call. Further arguments are fields of its hash with
-- their values: a separate redis.call would cost as much as many fields.
local function write_end(rid, state, finish, error, now, is_dead, ...)
  local key = req_key(rid)
  redis.call('HSET', key, 'state', state, 'finish', finish, 'error', error, 'owner', '', 't_end', now, ...)
  local f = redis.call('HMGET', key, 'stored', 'quota', 'max_new', 'n_prompt', 't_assign', 'call', 'usage', 'cached',
    'history', 'cls', 'epoch', 'attempts', 't_submit', 't_first', 'placed:1', 'n_virtual')
  local output = (f[2] or f[7]) and redis.call('STRLEN', P .. ':tok:' .. rid) / 4
  if f[2] then settle(rid, f[2], f[3], (f[4] or 0) + (f[16] or 0), f[5], output) end
  if f[7] then
    local usage = cmsgpack.unpack(f[7])
    if f[9] then
      local fields = {f[6], f[10], f[11], f[4], f[8], f[12], f[13], f[14], f[15]}
      note_history(rid, f[9], usage, output, fields, state, finish, error, now)
    end
    count_usage(rid, usage, output, state, tonumber(f[8] or 0), now, is_dead)
  end
  -- A request that is not stored is only read by its waiting gateway, immediately. An encoder's result (max_new is 0)
  -- is large.
  local ttl = is_dead and 604800 or f[1] == '1' and 86400 or f[3] == '0' and 60 or 120
  for _, kind in ipairs(request_kinds) do
    redis.call('EXPIRE', P .. kind .. rid, ttl)
  end
  if not is_dead then
    leave_call(rid, f[6], ttl, now, f[1] == '1')
    return
  end
  local to = now + ttl * 1000
  prolong(f[6], to)
  local c = redis.call('HMGET', call_key(f[6]), 'who', 'bytes', 'job')
  tell_job(c[3])
  if c[1] then
    redis.call('ZADD', quota_key(c[1]) .. ':kept', 'XX', to, f[6] .. ':' .. c[2])
    live_until(quota_key(c[1]) .. ':kept', to + 60000)
  end
end

-- Notify the scheduler that requests have ended: `message` is a packed list of `messages.Ended`.
local function tell_scheduler(message)
  redis.call('XADD', P .. ':ended', 'MAXLEN', '~', '10000', '*', 'b', message)
end

-- Remove a request's entry from the submit stream, if it is still there.
local function drop_submit(rid)
  local f = redis.call('HMGET', req_key(rid), 'cls', 'sub_id')
  if f[2] and f[2] ~= '' then
    redis.call('XDEL', P .. ':sub:' .. f[1], f[2])
    redis.call('HSET', req_key(rid), 'sub_id', '')
  end
end
