#!lua flags=allow-oom
-- Hand a batch of queued requests to a worker: all of them, or none if one is no longer as the scheduler believes.
--
-- KEYS[1]  string  prefix of the shard's keys
-- KEYS[2]  string  the leader's token
-- KEYS[3]  stream  the worker's assignments
-- ARGV[1]  str     token of the leader that asks; '' skips the check
-- ARGV[2]  str     wid of the worker
-- ARGV[3]  bytes   list of `messages.Assigned`, msgpack, for the stream
-- ARGV[4...]       per request, 3 values: rid (str), epoch when it was read (int), `messages.Placed` (bytes, msgpack; ''
--                  for none)
-- Reply: array of str. {'ok'}: assigned, also by an earlier call whose reply was lost.
--        {'deposed'}: another scheduler leads. {'gone'}: the worker's stream has expired.
--        {'stale', rid, ...}: these requests are not queued at that epoch, or are cancelled.
if ARGV[1] ~= '' and redis.call('GET', KEYS[2]) ~= ARGV[1] then return {'deposed'} end
local stale, num_mine, subs = {'stale'}, 0, {}
for i = 4, #ARGV, 3 do
  local f = redis.call('HMGET', req_key(ARGV[i]), 'state', 'epoch', 'cancel', 'owner', 'cls', 'sub_id')
  if f[1] ~= 'queued' or f[2] ~= ARGV[i + 1] or f[3] == '1' then
    stale[#stale + 1] = ARGV[i]
    if f[1] == 'assigned' and f[4] == ARGV[2] and tonumber(f[2]) == ARGV[i + 1] + 1 then num_mine = num_mine + 1 end
  elseif f[6] and f[6] ~= '' then
    subs[f[5]] = subs[f[5]] or {}
    table.insert(subs[f[5]], f[6])
  end
end
-- All are assigned exactly as asked: this call repeats one whose reply was lost.
if num_mine > 0 and num_mine == (#ARGV - 3) / 3 then return {'ok'} end
if #stale > 1 then return stale end
-- NOMKSTREAM: the stream of a dead worker must not come back without a TTL.
local id = redis.call('XADD', KEYS[3], 'NOMKSTREAM', '*', 'b', ARGV[3])
if not id then return {'gone'} end
for cls, ids in pairs(subs) do redis.call('XDEL', P .. ':sub:' .. cls, unpack(ids)) end
local now, owned = now_ms(), {}
for i = 4, #ARGV, 3 do
  local rid, epoch = ARGV[i], ARGV[i + 1] + 1
  redis.call('HSET', req_key(rid), 'state', 'assigned', 'owner', ARGV[2], 'epoch', epoch, 'sub_id', '', 't_assign', now,
    'start', redis.call('STRLEN', P .. ':tok:' .. rid) / 4)
  if ARGV[i + 2] ~= '' then
    local slot = note_slot(epoch)
    redis.call('HSET', req_key(rid), 'placed:' .. slot, ARGV[i + 2])
    if slot > 8 then redis.call('HDEL', req_key(rid), 'run:' .. slot, 'left:' .. slot) end
  end
  owned[#owned + 1] = rid
  owned[#owned + 1] = epoch
end
redis.call('HSET', own_key(ARGV[2]), unpack(owned))
redis.call('EXPIRE', own_key(ARGV[2]), 3600)  -- once it has expired, steps only cost more
return {'ok'}
