#!lua flags=allow-oom
-- Delete a job, or a call, with all that its requests have left, and give its tenant the bytes back. All have ended, as
-- whoever asks has seen: a queue that has lost such an end takes the request from where it still waits or runs.
--
-- KEYS  job      hash    the job; '' if it is none
--       jobs     zset    its tenant's jobs; '' if it is none
--       idem     string  what its Idempotency-Key was first used for; '' without one
-- ARGV  jid      str     id of the job; '' if it is none
--       tenant   str     whose texts a database may have of requests that have expired; '' for nobody's
--       text_ms  int     ms for which it may have them; 0 for no texts
--       rids...  str     of its requests, the call's first one first
-- Reply: int, 1 if the job was there, else 0; -1: too many texts wait to be deleted from the history's database, and
--        nothing was done.
local job, jobs, idem = unpack(KEYS, 2)
local jid, tenant, text_ms = unpack(ARGV, 1, 3)
local first = 4
local call = ARGV[first]
-- Texts that a database may have by now are noted for the gateway that writes it: first come, first served.
local deleted = P .. ':hist-deleted'
local is_full = redis.call('ZCARD', deleted) >= 100000
for a = first, #ARGV do
  local r = redis.call('HMGET', req_key(ARGV[a]), 'text', 'usage', 'history')
  local who, keep_ms = tenant, text_ms
  if r[1] then
    who, keep_ms = cmsgpack.unpack(r[2])[5], string.match(r[3], '^%d+')
  elseif text_ms ~= '0' and redis.call('EXISTS', req_key(ARGV[a])) == 1 then
    keep_ms = '0'
  end
  if keep_ms ~= '0' then
    if is_full then return -1 end
    redis.call('ZADD', deleted, now_ms(), who .. ':' .. ARGV[a])
    redis.call('PEXPIRE', deleted, keep_ms)
  end
end
local f = redis.call('HMGET', call_key(call), 'who', 'bytes')
if f[1] then give_back(f[1], call, f[2]) end
for a = first, #ARGV do
  local rid = ARGV[a]
  local owner = redis.call('HGET', req_key(rid), 'owner')
  if owner and owner ~= '' then disown(owner, rid) end
  drop_submit(rid)
  for _, kind in ipairs(request_kinds) do redis.call('UNLINK', P .. kind .. rid) end
end
redis.call('UNLINK', call_key(call), body_key(call))
if idem ~= '' then redis.call('DEL', idem) end
if job == '' then return 0 end
redis.call('ZREM', jobs, jid)
return redis.call('UNLINK', job)
