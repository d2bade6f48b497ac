#!lua flags=allow-oom
-- Delete a job, or a call, with all that its requests have left, and give its tenant the bytes back. All have ended, as
-- whoever asks has seen: a queue that has lost such an end takes the request from where it still waits or runs.
--
-- KEYS[1]  string  prefix of the shard's keys
-- KEYS[2]  hash    the job; '' if it is none
-- KEYS[3]  zset    its tenant's jobs; '' if it is none
-- KEYS[4]  string  what its Idempotency-Key was first used for; '' without one
-- ARGV[1]  str     id of the job; '' if it is none
-- ARGV[2...]       rids of its requests, the call's first one first
-- Reply: int, 1 if the job was there, else 0.
local call = call_key(ARGV[2])
local f = redis.call('HMGET', call, 'who', 'bytes')
if f[1] then give_back(f[1], ARGV[2], f[2]) end
for i = 2, #ARGV do
  local owner = redis.call('HGET', req_key(ARGV[i]), 'owner')
  if owner and owner ~= '' then disown(owner, ARGV[i]) end
  drop_submit(ARGV[i])
  for _, kind in ipairs(request_kinds) do redis.call('UNLINK', P .. kind .. ARGV[i]) end
end
redis.call('UNLINK', call, body_key(ARGV[2]))
if KEYS[4] ~= '' then redis.call('DEL', KEYS[4]) end
if KEYS[2] == '' then return 0 end
redis.call('ZREM', KEYS[3], ARGV[1])
return redis.call('UNLINK', KEYS[2])
