#!lua flags=allow-oom
-- Delete a job, or a call, with everything stored about its requests, and give its tenant the bytes back. The caller
-- has seen that all of them have ended. If the queue has lost such an end, the request is removed from where it waits
-- or runs.
--
-- KEYS  job      hash    the job; '' if there is none
--       jobs     zset    its tenant's jobs; '' if there is none
--       idem     string  record of its Idempotency-Key; '' without one
-- ARGV  jid      str     id of the job; '' if there is none
--       tenant   str     tenant of which a database may have texts of expired requests; '' for none
--       text_ms  int     ms for which the database may have them; 0: it has no texts
--       rids...  str     of its requests, the call's first one first
-- Reply: int, 1 if the job existed, else 0; -1: too many texts wait to be deleted from the history's database, and
--        nothing was done.
local job, jobs, idem = unpack(KEYS, 2)
local jid, tenant, text_ms = unpack(ARGV, 1, 3)
local first = 4
local call = ARGV[first]
-- Note texts that the database may already have, for the gateway that writes it. All are refused once the list is full.
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
-- The key may have been freed since, and belong to another job.
if idem ~= '' and string.find(redis.call('GET', idem) or '', jid, 1, true) then redis.call('DEL', idem) end
if job == '' then return 0 end
redis.call('ZREM', jobs, jid)
return redis.call('UNLINK', job)
