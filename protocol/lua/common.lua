-- Shared by all scripts (prepended to each). KEYS[1] is the shard prefix "lf:{s}"; a request's keys are built
-- from it, so every key of a request lies in one hash slot.
local P = KEYS[1]
local function req_key(rid) return P .. ':req:' .. rid end

-- Hash rid -> epoch of what a worker may write: just those that are assigned to it at that epoch and not cancelled.
-- Whatever changes one of these facts must change this too.
local function own_key(wid) return P .. ':w:' .. wid .. ':own' end

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function is_terminal(state)
  return state == 'completed' or state == 'failed' or state == 'cancelled'
end

local request_kinds = {':req:', ':body:', ':tok:', ':lp:'}

-- Write the end of a request: state, reason, times; shorten the life of its keys.
local function write_end(rid, state, finish, error, now)
  local key = req_key(rid)
  local stored = redis.call('HGET', key, 'stored')
  redis.call('HSET', key, 'state', state, 'finish', finish, 'error', error, 'owner', '', 't_end', now)
  local ttl = stored == '1' and 86400 or 600
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
