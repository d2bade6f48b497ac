-- Accept a group of requests (the choices and prompts of one HTTP call) all together, or none of them.
-- KEYS: prefix, submit stream, idempotency key or ''
-- ARGV: class, max queued, idempotency value or '', then per request:
--       rid, submit message, body, tenant, digest, gateway, stored, n_prompt, max_new, deadline_ms
-- -> {'ok'} | {'full', queued} | {'idem', value stored under the key}
local cls, max_queued, idem_value = ARGV[1], tonumber(ARGV[2]), ARGV[3]
-- Accepted before, and the reply was lost: a second entry, or a reset epoch, would run the request twice.
if redis.call('EXISTS', req_key(ARGV[4])) == 1 then return {'ok'} end
if KEYS[3] ~= '' then
  local seen = redis.call('GET', KEYS[3])
  if seen then return {'idem', seen} end
end
local num = (#ARGV - 3) / 10
local queued = redis.call('XLEN', KEYS[2])
if queued + num > max_queued then return {'full', queued} end
local now = now_ms()
for i = 0, num - 1 do
  local a = 3 + i * 10
  local rid, sub, body, deadline = ARGV[a + 1], ARGV[a + 2], ARGV[a + 3], tonumber(ARGV[a + 10])
  local ttl = math.max(deadline - now, 0) + 3600000
  local id = redis.call('XADD', KEYS[2], '*', 'b', sub, 'e', '0')
  redis.call('HSET', req_key(rid), 'state', 'queued', 'cls', cls, 'epoch', 0, 'attempts', 0, 'owner', '', 'cancel', 0,
    'tenant', ARGV[a + 4], 'digest', ARGV[a + 5], 'gateway', ARGV[a + 6], 'stored', ARGV[a + 7],
    'n_prompt', ARGV[a + 8], 'max_new', ARGV[a + 9], 'deadline', deadline, 'sub', sub, 'sub_id', id, 't_submit', now)
  redis.call('PEXPIRE', req_key(rid), ttl)
  redis.call('SET', P .. ':body:' .. rid, body, 'PX', ttl)
end
if KEYS[3] ~= '' then redis.call('SET', KEYS[3], idem_value, 'EX', 86400) end
return {'ok'}
