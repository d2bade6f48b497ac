#!lua
-- Accept a group of requests, the choices and prompts of one HTTP call: all of them, or none.
--
-- KEYS  queue         stream  submitted requests of the class
--       idem          string  record of an Idempotency-Key; '' without one
--       job           hash    the call as a background job; '' if it is none
--       jobs          zset    the jobs of its tenant by creation time; '' if it is none
--       conversation  hash    the conversation of which the job is a turn; '' if it is none
--       turns         zset    all turns to be added, by time of the next check; '' if it is none
-- ARGV  cls           str     class
--       max_queued    int     maximum number of queued requests of the class
--       idem_value    bytes   `messages.Idempotent`, msgpack; '' without one
--       who           str     tenant whose limits apply; '' for none
--       max_requests  int     its requests per minute, 0: no limit
--       max_tokens    int     its tokens per minute, 0: no limit
--       max_running   int     its requests at once, 0: no limit
--       max_bytes     int     bytes that it may keep in the queue, 0: no limit
--       is_forced     int     1: count its use but refuse nothing, else 0
--       num_bytes     int     maximum bytes of bodies, messages and logs
--       record_bytes  int     bytes of the records of job and Idempotency-Key
--       jid           str     id of the job; '' if it is none
--       job_record    bytes   `messages.Job`, msgpack
--       job_request   bytes   fields of the job's HTTP body that its answer needs
--       job_ttl_ms    int     TTL of the job, ms
--       is_told       int     1: webhooks report the job's end, else 0
--       max_turns     int     maximum number of turns waiting to be added to a conversation
--       body_bytes    int     bytes of the bodies if they live as long as the requests' records; 0 if the last end
--                             deletes them
--       history       str     retention of ends in the tenant's history, ms, a space, their maximum number; '' for none
--       text          int     maximum tokens of each prompt and output kept there; 0 for none
--       tokenizer     str     hash of the base's tokenizer, if tokens are kept there
--       num_fields    int     number of bodies' fields
--       fields...     list    per field of the bodies' hash, see `calls.py`: name (str), value (bytes)
--       rows...       list    per request: rid (str), sub (bytes, `messages.RequestHead`, msgpack), tenant (str),
--                             digest (str), gateway (str), is_stored (int, 0 or 1), num_prompt (int, tokens),
--                             num_virtual (int, virtual tokens of its adapter), max_new (int, tokens), deadline_ms
--                             (int, unix ms), usage (bytes, what it adds to its tenant's usage, see `usage.py`; ''
--                             for nothing)
-- Reply: array. A standing is 5 ints: requests left in this minute, ms until all are available, tokens left, ms,
--        running requests.
--        {'ok', standing...}; {'ok'} without a tenant, or if the requests were accepted before and the reply was lost.
--        {'full', number of queued requests (int)}
--        {'idem', value stored under `idem` (bytes)}
--        {'conversation', turns waiting to be added (int), or -1: its tenant has no such conversation}
--        {'limit', standing..., 'requests' | 'tokens' | 'concurrency' (str), ms until it would fit or 0 (int)}
--        {'limit', standing..., 'bytes', 0, bytes that the tenant keeps (int), bytes that the call adds (int)}
local queue, idem, job, jobs, conversation, turns = unpack(KEYS, 2)
local cls, max_queued, idem_value, who, max_requests, max_tokens, max_running, max_bytes, is_forced, num_bytes,
  record_bytes, jid, job_record, job_request, job_ttl_ms, is_told, max_turns, body_bytes, history, text,
  tokenizer, num_fields = unpack(ARGV, 1, 22)
max_queued, max_bytes, is_forced = tonumber(max_queued), tonumber(max_bytes), is_forced == '1'
local first = 23
local first_row = first + num_fields * 2
local call = ARGV[first_row]
-- Accepted before, but the reply was lost: a second entry, or an epoch set back, would run the request twice. The first
-- request may have expired while others run, or all requests may have just ended.
if redis.call('EXISTS', call_key(call), req_key(call)) > 0 then return {'ok'} end
if idem ~= '' then
  local seen = redis.call('GET', idem)
  if seen then return {'idem', seen} end
end
local num, now = (#ARGV - first_row + 1) / 11, now_ms()

local limits = {requests = tonumber(max_requests), tokens = tonumber(max_tokens), concurrency = tonumber(max_running)}
local used, running, last = {requests = 0, tokens = 0}, 0, 0
local wanted = {requests = 1, tokens = 0, bytes = num_bytes + record_bytes + num * request_bytes}

-- Return the rest of a limit per minute, and the ms until all of it is available.
local function left(what)
  local limit = limits[what]
  if limit == 0 then return 0, 0 end
  return math.max(0, math.floor(limit - used[what])), math.ceil(used[what] * 60000 / limit)
end

-- Return a reply of `code`, the tenant's standing, and any further values.
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
  for a = first_row, #ARGV, 11 do
    local _, _, _, _, _, _, num_prompt, num_virtual, max_new, deadline_ms = unpack(ARGV, a, a + 10)
    wanted.tokens = wanted.tokens + num_prompt + num_virtual + max_new
    last = math.max(last, tonumber(deadline_ms))
  end
  redis.call('ZREMRANGEBYSCORE', quota_key(who) .. ':run', '-inf', now)
  running = redis.call('ZCARD', quota_key(who) .. ':run')
  if not is_forced then
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

if who ~= '' and max_bytes > 0 and not is_forced then
  local kept = kept_bytes(who, now)
  if kept + wanted.bytes > max_bytes then return answer('limit', 'bytes', 0, kept, wanted.bytes) end
end

local owner, conversation_id = string.match(jobs, '[^:]*$'), string.match(conversation, '[^:]*$')
if conversation_id ~= '' then
  -- If a queue has lost its last second, the conversation may be missing when a forced call is repeated.
  local is_there = redis.call('HGET', conversation, 'tenant') == owner
  local num_turns = redis.call('ZCARD', conversation .. ':turns')
  if not is_forced and not is_there then return {'conversation', -1} end
  if not is_forced and num_turns >= tonumber(max_turns) then return {'conversation', num_turns} end
  if not is_there then conversation_id = '' end
end
local queued = redis.call('XLEN', queue)
if queued + num > max_queued then return {'full', queued} end
local to = 0
for a = first_row, #ARGV, 11 do
  local rid, sub, tenant, digest, gateway, is_stored, num_prompt, num_virtual, max_new, deadline_ms, usage =
    unpack(ARGV, a, a + 10)
  deadline_ms = tonumber(deadline_ms)
  local ttl = math.max(deadline_ms - now, 0) + 3600000
  to = math.max(to, now + ttl)
  local id = redis.call('XADD', queue, '*', 'b', sub, 'e', '0')
  local more = {}
  if usage ~= '' and history ~= '' then
    more = {'usage', usage, 'history', history}
  elseif usage ~= '' then
    more = {'usage', usage}
  end
  if usage ~= '' and history ~= '' and text ~= '0' then
    more[#more + 1] = 'text'
    more[#more + 1] = text
    more[#more + 1] = 'tokenizer'
    more[#more + 1] = tokenizer
  end
  if is_rated then
    more[#more + 1] = 'quota'
    more[#more + 1] = who
    if num_virtual ~= '0' then
      more[#more + 1] = 'n_virtual'
      more[#more + 1] = num_virtual
    end
  end
  redis.call('HSET', req_key(rid), 'state', 'queued', 'cls', cls, 'epoch', 0, 'attempts', 0, 'owner', '', 'cancel', 0,
    'tenant', tenant, 'digest', digest, 'gateway', gateway, 'stored', is_stored, 'n_prompt', num_prompt,
    'max_new', max_new, 'deadline', deadline_ms, 'sub', sub, 'sub_id', id, 't_submit', now, 'call', call,
    'ahead', queued + (a - first_row) / 11, unpack(more))
  redis.call('PEXPIRE', req_key(rid), ttl)
  if is_rated then
    -- The request's end removes it from the set; if the queue loses that end, the deadline does.
    redis.call('ZADD', quota_key(who) .. ':run', deadline_ms + 60000, rid)
  end
end
local known = {'open', num}  -- fields of the call's hash
if body_bytes ~= '0' then known = {'open', num, 'kept', body_bytes} end
for a = first, first_row - 2, 1000 do  -- alternating names and values
  redis.call('HSET', body_key(call), unpack(ARGV, a, math.min(a + 999, first_row - 1)))
end
redis.call('PEXPIREAT', body_key(call), to)
local lives = 0  -- unix ms when the records expire
if idem ~= '' then
  redis.call('SET', idem, idem_value, 'EX', 86400)
  lives = now + 86400000
end
if job ~= '' then
  local ttl = tonumber(job_ttl_ms)
  lives = math.max(lives, now + ttl)
  redis.call('HSET', job, 'b', job_record, 'request', job_request)
  if is_told == '1' then
    known[#known + 1] = 'job'
    known[#known + 1] = owner .. ':' .. jid
  end
  redis.call('PEXPIRE', job, ttl)
  redis.call('ZADD', jobs, now, jid)
  redis.call('ZREMRANGEBYSCORE', jobs, '-inf', now - ttl)
  redis.call('PEXPIRE', jobs, ttl)
end
if conversation_id ~= '' then
  redis.call('ZADD', conversation .. ':turns', now, jid)
  live_until(conversation .. ':turns', redis.call('PEXPIRETIME', conversation))
  redis.call('ZADD', turns, now + 60000, owner .. ':' .. conversation_id .. ':' .. jid)
end
if who == '' then
  redis.call('HSET', call_key(call), unpack(known))
else
  redis.call('HSET', call_key(call), 'who', who, 'bytes', wanted.bytes, 'left', record_bytes, 'last', lives,
    unpack(known))
  keep(who, call, wanted.bytes, math.max(to, lives))
end
redis.call('PEXPIREAT', call_key(call), to)
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
