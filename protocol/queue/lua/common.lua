-- Shared by all scripts (prepended to each). KEYS[1] is the shard prefix "lf:{s}"; a request's keys are built
-- from it, so every key of a request lies in one hash slot.
local P = KEYS[1]
local function req_key(rid) return P .. ':req:' .. rid end

-- Hash rid -> epoch of what a worker may write: exactly the requests that are assigned to it at that epoch and not
-- cancelled. Whatever changes one of these facts must change this hash too.
local function own_key(wid) return P .. ':w:' .. wid .. ':own' end

-- Take a request from its worker: before its end from outside, its cancellation, or another owner.
local function disown(wid, rid) redis.call('HDEL', own_key(wid), rid) end

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function is_terminal(state)
  return state == 'completed' or state == 'failed' or state == 'cancelled'
end

local request_kinds = {':req:', ':body:', ':tok:', ':lp:', ':plp:'}

-- What a tenant has used: a hash of two buckets that empty evenly over a minute, and a sorted set of what runs.
-- No tenant's name has a colon, so that none's keys can be another's.
local function quota_key(tenant) return P .. ':q:' .. tenant end

-- Give back what a request had reserved and did not use. The field goes with it, so that nothing is given back twice.
local function settle(rid, tenant, max_new, num_prompt, assigned)
  local key = quota_key(tenant)
  redis.call('HDEL', req_key(rid), 'quota')
  redis.call('ZREM', key .. ':run', rid)
  local unused = assigned and max_new - redis.call('STRLEN', P .. ':tok:' .. rid) / 4 or max_new + num_prompt
  -- A bucket that is gone is full again.
  if unused > 0 and redis.call('HEXISTS', key, 'tokens') == 1 then redis.call('HINCRBYFLOAT', key, 'tokens', -unused) end
end

-- Write the end of a request: state, reason, times; shorten the life of its keys.
local function write_end(rid, state, finish, error, now)
  local key = req_key(rid)
  local f = redis.call('HMGET', key, 'stored', 'quota', 'max_new', 'n_prompt', 't_assign')
  redis.call('HSET', key, 'state', state, 'finish', finish, 'error', error, 'owner', '', 't_end', now)
  if f[2] then settle(rid, f[2], f[3], f[4], f[5]) end
  -- What an encoder made, without a token to come, is large and read at once.
  local ttl = f[1] == '1' and 86400 or f[3] == '0' and 60 or 600
  for _, kind in ipairs(request_kinds) do
    redis.call('EXPIRE', P .. kind .. rid, ttl)
  end
end

-- Say that requests have ended, to whoever counts them.
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
