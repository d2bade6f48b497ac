#!lua
-- Accept a group of requests, the choices and prompts of one HTTP call: all of them, or none.
--
-- KEYS[1]  string  prefix of the shard's keys
-- KEYS[2]  stream  submitted requests of the class
-- KEYS[3]  string  what an Idempotency-Key was first used for; '' without one
-- KEYS[4]  hash    the call as a background job; '' if it is none
-- KEYS[5]  zset    the jobs of its tenant by creation time; '' if it is none
-- KEYS[6]  hash    the conversation that the job is a turn of; '' if it is none
-- KEYS[7]  zset    all turns that are to be added, by when to look; '' if it is none
-- ARGV[1]  str     class
-- ARGV[2]  int     most requests that the class may have queued
-- ARGV[3]  bytes   `messages.Idempotent`, msgpack; '' without one
-- ARGV[4]  str     tenant whose limits count; '' for none
-- ARGV[5]  int     its requests a minute, 0: no limit
-- ARGV[6]  int     its tokens a minute, 0: no limit
-- ARGV[7]  int     its requests at once, 0: no limit
-- ARGV[8]  int     bytes that it may keep in the queue, 0: no limit
-- ARGV[9]  int     1: count its use without refusing, else 0
-- ARGV[10] int     most bytes that bodies, messages and logs can come to
-- ARGV[11] int     bytes of the records of job and Idempotency-Key
-- ARGV[12] str     id of the job; '' if it is none
-- ARGV[13] bytes   `messages.Job`, msgpack
-- ARGV[14] bytes   what of the job's HTTP body writing its answer needs
-- ARGV[15] int     ms that the job lives
-- ARGV[16] int     1: the job's end is told to whoever sends webhooks, else 0
-- ARGV[17] int     most turns of a conversation that are to be added
-- ARGV[18] int     bytes of the bodies where they live on as long as the requests, 0 where they go with the last one
-- ARGV[19] int     number of bodies' fields
-- ARGV[20...]      per field of the bodies' hash, 2 values: name (str), value (bytes), see `calls.py`
--                  then per request, 10 values: rid (str), `messages.Submit` (bytes, msgpack), tenant (str), digest
--                  (str), gateway (str), stored (int, 0 or 1), n_prompt (int, tokens), max_new (int, tokens), deadline
--                  (int, unix ms), what it adds to its tenant's usage (bytes, see `usage.py`; '' for nothing)
-- Reply: array. A standing is 5 ints: requests left of the minute, ms until all are left, tokens left, ms, requests
--        running.
--        {'ok', standing...}; without a tenant {'ok'}, and so when the requests are known: an earlier reply was lost.
--        {'full', number of queued requests (int)}
--        {'idem', value stored under KEYS[3] (bytes)}
--        {'conversation', turns that are to be added (int), or -1: its tenant has no such conversation}
--        {'limit', standing..., 'requests' | 'tokens' | 'concurrency' (str), ms until it would fit or 0 (int)}
--        {'limit', standing..., 'bytes', 0, bytes that the tenant keeps (int), bytes that the call adds (int)}
local cls, max_queued, idem_value, who, forced = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[9] == '1'
local first_field, width = 20, 10
local first = first_field + ARGV[19] * 2
local call = ARGV[first]
-- Accepted before, and the reply was lost: a second entry, or an epoch set back, would run the request twice. The first
-- request may have ended and expired while others run, or all may have ended just now.
if redis.call('EXISTS', call_key(call), req_key(call)) > 0 then return {'ok'} end
if KEYS[3] ~= '' then
  local seen = redis.call('GET', KEYS[3])
  if seen then return {'idem', seen} end
end
local num, now = (#ARGV - first + 1) / width, now_ms()

local limits = {requests = tonumber(ARGV[5]), tokens = tonumber(ARGV[6]), concurrency = tonumber(ARGV[7])}
local used, running, last, max_bytes = {requests = 0, tokens = 0}, 0, 0, tonumber(ARGV[8])
local wanted = {requests = 1, tokens = 0, bytes = ARGV[10] + ARGV[11] + num * request_bytes}

-- Return what is left of a minute's limit, and the ms until all of it is there again.
local function left(what)
  local limit = limits[what]
  if limit == 0 then return 0, 0 end
  return math.max(0, math.floor(limit - used[what])), math.ceil(used[what] * 60000 / limit)
end

-- Return a code and the tenant's standing, then whatever is given.
local function answer(code, ...)
  local requests, requests_ms = left('requests')
  local tokens, tokens_ms = left('tokens')
  return {code, requests, requests_ms, tokens, tokens_ms, running, ...}
end

local is_rated = who ~= '' and limits.requests + limits.tokens + limits.concurrency > 0
if is_rated then
  local f = redis.call('HMGET', quota_key(who), 'requests', 'tokens', 'ms')
  local passed = now - tonumber(f[3] or now)
  for i, what in ipairs({'requests', 'tokens'}) do
    if limits[what] > 0 then used[what] = math.max(0, tonumber(f[i] or 0) - passed * limits[what] / 60000) end
  end
  for a = first, #ARGV, width do
    wanted.tokens = wanted.tokens + ARGV[a + 6] + ARGV[a + 7]
    last = math.max(last, tonumber(ARGV[a + 8]))
  end
  redis.call('ZREMRANGEBYSCORE', quota_key(who) .. ':run', '-inf', now)
  running = redis.call('ZCARD', quota_key(who) .. ':run')
  if not forced then
    if limits.concurrency > 0 and running + num > limits.concurrency then
      return answer('limit', 'concurrency', 0)
    end
    for _, what in ipairs({'requests', 'tokens'}) do
      local over = used[what] + wanted[what] - limits[what]
      if limits[what] > 0 and over > 0 then
        return answer('limit', what, math.ceil(over * 60000 / limits[what]))
      end
    end
  end
end

if who ~= '' and max_bytes > 0 and not forced then
  local kept = kept_bytes(who, now)
  if kept + wanted.bytes > max_bytes then return answer('limit', 'bytes', 0, kept, wanted.bytes) end
end

local owner, conversation = string.match(KEYS[5], '[^:]*$'), string.match(KEYS[6], '[^:]*$')
if conversation ~= '' then
  -- One that a queue has lost with its last second is not there when a forced call comes again.
  local is_there = redis.call('HGET', KEYS[6], 'tenant') == owner
  local num_turns = redis.call('ZCARD', KEYS[6] .. ':turns')
  if not forced and not is_there then return {'conversation', -1} end
  if not forced and num_turns >= tonumber(ARGV[17]) then return {'conversation', num_turns} end
  if not is_there then conversation = '' end
end
local queued = redis.call('XLEN', KEYS[2])
if queued + num > max_queued then return {'full', queued} end
local to = 0
for a = first, #ARGV, width do
  local rid, sub, deadline = ARGV[a], ARGV[a + 1], tonumber(ARGV[a + 8])
  local ttl = math.max(deadline - now, 0) + 3600000
  to = math.max(to, now + ttl)
  local id = redis.call('XADD', KEYS[2], '*', 'b', sub, 'e', '0')
  redis.call('HSET', req_key(rid), 'state', 'queued', 'cls', cls, 'epoch', 0, 'attempts', 0, 'owner', '', 'cancel', 0,
    'tenant', ARGV[a + 2], 'digest', ARGV[a + 3], 'gateway', ARGV[a + 4], 'stored', ARGV[a + 5],
    'n_prompt', ARGV[a + 6], 'max_new', ARGV[a + 7], 'deadline', deadline, 'sub', sub, 'sub_id', id, 't_submit', now,
    'call', call, 'ahead', queued + (a - first) / width)
  if ARGV[a + 9] ~= '' then redis.call('HSET', req_key(rid), 'usage', ARGV[a + 9]) end
  redis.call('PEXPIRE', req_key(rid), ttl)
  if is_rated then
    redis.call('HSET', req_key(rid), 'quota', who)
    -- Its end removes it from the set. Should that be lost with the queue's last second, its deadline does.
    redis.call('ZADD', quota_key(who) .. ':run', deadline + 60000, rid)
  end
end
redis.call('HSET', call_key(call), 'open', num)
if ARGV[18] ~= '0' then redis.call('HSET', call_key(call), 'kept', ARGV[18]) end
redis.call('PEXPIREAT', call_key(call), to)
for a = first_field, first - 2, 1000 do
  redis.call('HSET', body_key(call), unpack(ARGV, a, math.min(a + 999, first - 1)))
end
redis.call('PEXPIREAT', body_key(call), to)
local lives = 0  -- until when the records live
if KEYS[3] ~= '' then
  redis.call('SET', KEYS[3], idem_value, 'EX', 86400)
  lives = now + 86400000
end
if KEYS[4] ~= '' then
  local ttl = tonumber(ARGV[15])
  lives = math.max(lives, now + ttl)
  redis.call('HSET', KEYS[4], 'b', ARGV[13], 'request', ARGV[14])
  if ARGV[16] == '1' then redis.call('HSET', call_key(call), 'job', owner .. ':' .. ARGV[12]) end
  redis.call('PEXPIRE', KEYS[4], ttl)
  redis.call('ZADD', KEYS[5], now, ARGV[12])
  redis.call('ZREMRANGEBYSCORE', KEYS[5], '-inf', now - ttl)
  redis.call('PEXPIRE', KEYS[5], ttl)
end
if conversation ~= '' then
  redis.call('ZADD', KEYS[6] .. ':turns', now, ARGV[12])
  live_until(KEYS[6] .. ':turns', redis.call('PEXPIRETIME', KEYS[6]))
  redis.call('ZADD', KEYS[7], now + 60000, owner .. ':' .. conversation .. ':' .. ARGV[12])
end
if who ~= '' then
  redis.call('HSET', call_key(call), 'who', who, 'bytes', wanted.bytes, 'left', ARGV[11], 'last', lives)
  keep(who, call, wanted.bytes, math.max(to, lives))
end
if who == '' then return {'ok'} end
if not is_rated then return answer('ok') end
for _, what in ipairs({'requests', 'tokens'}) do
  if limits[what] > 0 then used[what] = used[what] + wanted[what] end
end
running = running + num
redis.call('HSET', quota_key(who), 'requests', used.requests, 'tokens', used.tokens, 'ms', now)
local reply = answer('ok')
redis.call('PEXPIRE', quota_key(who), math.max(reply[3], reply[5]) + 60000)
local ttl = last + 60000 - now
if redis.call('PTTL', quota_key(who) .. ':run') < ttl then redis.call('PEXPIRE', quota_key(who) .. ':run', ttl) end
return reply
