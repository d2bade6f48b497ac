-- Accept a group of requests (the choices and prompts of one HTTP call) all together, or none of them.
-- KEYS: prefix, submit stream, idempotency key or ''
-- ARGV: class, max queued, idempotency value or '', tenant whose limits count or '', its requests a minute, tokens a
--       minute and requests at once (0: no limit), 1 to count without refusing else 0, then per request:
--       rid, submit message, body, tenant, digest, gateway, stored, n_prompt, max_new, deadline_ms
-- -> {'ok', standing} | {'full', queued} | {'idem', value stored under the key}
--    | {'limit', standing, 'requests' | 'tokens' | 'concurrency', ms until it would fit or 0 when nobody knows}
--    standing: requests left, ms until all are there again, tokens left, ms, requests running; nothing without a tenant
local cls, max_queued, idem_value, who, forced = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[8] == '1'
local first, width = 9, 10
-- Accepted before, and the reply was lost: a second entry, or a reset epoch, would run the request twice.
if redis.call('EXISTS', req_key(ARGV[first])) == 1 then return {'ok'} end
if KEYS[3] ~= '' then
  local seen = redis.call('GET', KEYS[3])
  if seen then return {'idem', seen} end
end
local num, now = (#ARGV - first + 1) / width, now_ms()

local limits = {requests = tonumber(ARGV[5]), tokens = tonumber(ARGV[6]), concurrency = tonumber(ARGV[7])}
local used, running, last = {requests = 0, tokens = 0}, 0, 0
local wanted = {requests = 1, tokens = 0}

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

if who ~= '' then
  local f = redis.call('HMGET', quota_key(who), 'requests', 'tokens', 'ms')
  local passed = now - tonumber(f[3] or now)
  for i, what in ipairs({'requests', 'tokens'}) do
    if limits[what] > 0 then used[what] = math.max(0, tonumber(f[i] or 0) - passed * limits[what] / 60000) end
  end
  for a = first, #ARGV, width do
    wanted.tokens = wanted.tokens + ARGV[a + 7] + ARGV[a + 8]
    last = math.max(last, tonumber(ARGV[a + 9]))
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

local queued = redis.call('XLEN', KEYS[2])
if queued + num > max_queued then return {'full', queued} end
for a = first, #ARGV, width do
  local rid, sub, body, deadline = ARGV[a], ARGV[a + 1], ARGV[a + 2], tonumber(ARGV[a + 9])
  local ttl = math.max(deadline - now, 0) + 3600000
  local id = redis.call('XADD', KEYS[2], '*', 'b', sub, 'e', '0')
  redis.call('HSET', req_key(rid), 'state', 'queued', 'cls', cls, 'epoch', 0, 'attempts', 0, 'owner', '', 'cancel', 0,
    'tenant', ARGV[a + 3], 'digest', ARGV[a + 4], 'gateway', ARGV[a + 5], 'stored', ARGV[a + 6],
    'n_prompt', ARGV[a + 7], 'max_new', ARGV[a + 8], 'deadline', deadline, 'sub', sub, 'sub_id', id, 't_submit', now)
  redis.call('PEXPIRE', req_key(rid), ttl)
  redis.call('SET', P .. ':body:' .. rid, body, 'PX', ttl)
  if who ~= '' then
    redis.call('HSET', req_key(rid), 'quota', who)
    -- The end takes it out; should that be lost with a queue's last second, its deadline does.
    redis.call('ZADD', quota_key(who) .. ':run', deadline + 60000, rid)
  end
end
if KEYS[3] ~= '' then redis.call('SET', KEYS[3], idem_value, 'EX', 86400) end
if who == '' then return {'ok'} end
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
