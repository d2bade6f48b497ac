#!lua flags=allow-oom
-- Hand a batch of queued requests to a worker: all of them, or none if one has changed since the scheduler read it.
--
-- KEYS  leader   string  the leader's token
--       work     stream  the worker's assignments
-- ARGV  token    str     token of the calling leader; '' skips the check
--       wid      str     id of the worker
--       entry    bytes   list of `messages.Assigned`, msgpack, for the stream
--       rows...  list    per request: rid (str), epoch (int, when it was read), placed (bytes, `messages.Placed`,
--                        msgpack; '' for none)
-- Reply: array of str. {'ok'}: assigned, also by an earlier call whose reply was lost.
--        {'deposed'}: another scheduler leads. {'gone'}: the worker's stream has expired.
--        {'stale', rid, ...}: these requests are not queued at that epoch, or are cancelled.
local leader, work = unpack(KEYS, 2)
local token, wid, entry = unpack(ARGV, 1, 3)
if token ~= '' and redis.call('GET', leader) ~= token then return {'deposed'} end
local first, stale, num_mine, subs = 4, {'stale'}, 0, {}
for a = first, #ARGV, 3 do
  local rid, epoch = unpack(ARGV, a, a + 2)
  local f = redis.call('HMGET', req_key(rid), 'state', 'epoch', 'cancel', 'owner', 'cls', 'sub_id')
  if f[1] ~= 'queued' or f[2] ~= epoch or f[3] == '1' then
    stale[#stale + 1] = rid
    if f[1] == 'assigned' and f[4] == wid and tonumber(f[2]) == epoch + 1 then num_mine = num_mine + 1 end
  elseif f[6] and f[6] ~= '' then
    subs[f[5]] = subs[f[5]] or {}
    table.insert(subs[f[5]], f[6])
  end
end
-- All requests are already assigned exactly as requested: this call repeats one whose reply was lost.
if num_mine > 0 and num_mine == (#ARGV - first + 1) / 3 then return {'ok'} end
if #stale > 1 then return stale end
-- NOMKSTREAM: the stream of a dead worker must not be created again, since it would have no TTL.
local id = redis.call('XADD', work, 'NOMKSTREAM', '*', 'b', entry)
if not id then return {'gone'} end
for cls, ids in pairs(subs) do redis.call('XDEL', P .. ':sub:' .. cls, unpack(ids)) end
local now, owned = now_ms(), {}
for a = first, #ARGV, 3 do
  local rid, epoch, placed = unpack(ARGV, a, a + 2)
  epoch = epoch + 1
  local slot, note = note_slot(epoch), {}
  if placed ~= '' then note = {'placed:' .. slot, placed} end
  redis.call('HSET', req_key(rid), 'state', 'assigned', 'owner', wid, 'epoch', epoch, 'sub_id', '', 't_assign', now,
    'start', redis.call('STRLEN', P .. ':tok:' .. rid) / 4, unpack(note))
  if placed ~= '' and slot > 8 then redis.call('HDEL', req_key(rid), 'run:' .. slot, 'left:' .. slot) end
  owned[#owned + 1] = rid
  owned[#owned + 1] = epoch
end
redis.call('HSET', own_key(wid), unpack(owned))
redis.call('EXPIRE', own_key(wid), 3600)  -- if it expires, steps still work, but cost more
return {'ok'}
