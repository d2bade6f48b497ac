-- What all scripts share; it is prepended to each.
-- KEYS[1] is a string in every script: the prefix of the shard's keys, "lf:{s}". A request's keys are built from it, so
-- all of them lie in one hash slot.
-- At the head of each script its contract names type and unit of every key, argument and reply. Arguments arrive as
-- strings; "int" is a decimal string there. "ms" is unix time or a duration in milliseconds.
local P = KEYS[1]
local function req_key(rid) return P .. ':req:' .. rid end

-- Hash rid -> epoch of what a worker may write: exactly the requests that are assigned to it at that epoch and not
-- cancelled. Whatever changes one of these facts must change this hash too.
local function own_key(wid) return P .. ':w:' .. wid .. ':own' end

-- Take a request from its worker: before its end from outside, its cancellation, or another owner.
local function disown(wid, rid) redis.call('HDEL', own_key(wid), rid) end

-- Return unix time in ms, by the server's clock.
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- Return whether a state is the end of a request.
local function is_terminal(state)
  return state == 'completed' or state == 'failed' or state == 'cancelled'
end

-- Kinds of keys that a request has.
local request_kinds = {':req:', ':body:', ':tok:', ':lp:', ':plp:'}

-- Return the key of a tenant's use: a hash of two buckets that empty evenly over a minute. With ':run' behind it, the
-- key of a sorted set of its running requests. A tenant's name has no colon, so two tenants never share a key.
local function quota_key(tenant) return P .. ':q:' .. tenant end

-- Give back the tokens that a request had reserved of its tenant's bucket and did not use. Deleting the field `quota`
-- makes sure that this happens once.
local function settle(rid, tenant, max_new, num_prompt, assigned)
  local key = quota_key(tenant)
  redis.call('HDEL', req_key(rid), 'quota')
  redis.call('ZREM', key .. ':run', rid)
  local unused = assigned and max_new - redis.call('STRLEN', P .. ':tok:' .. rid) / 4 or max_new + num_prompt
  -- A bucket that has expired is full again.
  if unused > 0 and redis.call('HEXISTS', key, 'tokens') == 1 then
    redis.call('HINCRBYFLOAT', key, 'tokens', -unused)
  end
end

-- Write the end of a request: its state, reason (`finish`), error and time (`now`, ms); shorten the life of its keys.
local function write_end(rid, state, finish, error, now)
  local key = req_key(rid)
  local f = redis.call('HMGET', key, 'stored', 'quota', 'max_new', 'n_prompt', 't_assign')
  redis.call('HSET', key, 'state', state, 'finish', finish, 'error', error, 'owner', '', 't_end', now)
  if f[2] then settle(rid, f[2], f[3], f[4], f[5]) end
  -- An encoder's result (max_new is 0) is large and read at once, so it lives for a minute only.
  local ttl = f[1] == '1' and 86400 or f[3] == '0' and 60 or 600
  for _, kind in ipairs(request_kinds) do
    redis.call('EXPIRE', P .. kind .. rid, ttl)
  end
end

-- Tell the scheduler that requests have ended: `message` is a packed list of `messages.Ended`.
local function tell_scheduler(message)
  redis.call('XADD', P .. ':ended', 'MAXLEN', '~', '10000', '*', 'b', message)
end

-- Take a request's entry out of the submit stream, if it is still there.
local function drop_submit(rid)
  local f = redis.call('HMGET', req_key(rid), 'cls', 'sub_id')
  if f[2] and f[2] ~= '' then
    redis.call('XDEL', P .. ':sub:' .. f[1], f[2])
    redis.call('HSET', req_key(rid), 'sub_id', '')
  end
end
