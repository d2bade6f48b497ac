#!lua flags=allow-oom
-- Register a worker under its base's name with its first beat, unless live workers serve another base by it. Only one
-- that knows the bases of its fleet joins beside live workers of others.
--
-- A base's record is the first one, or one of the further ones. When a worker of a base without record joins a fleet
-- without workers, the records of bases go that it does not know; if the first goes, it is replaced.
--
-- KEYS  base         string  the first base, as messages.ServedModel
--       bases        hash    name -> each further base, at most 31; NUL name -> why no worker of a base has started
--       workers      zset    worker id -> unix ms of its last heartbeat
--       worker_beat  string  the worker's heartbeat; the key holds its id
-- ARGV  wid          str     the worker's id: letters and digits
--       beat         bytes   its heartbeat
--       ttl_ms       int     ms that the heartbeat lasts
--       at_ms        int     unix ms now
--       name         str     its base's name
--       first_base   bytes   the first base as the caller read it; '' if there was none
--       further      bytes   the further base of that name as the caller read it; '' if there was none
--       alone        bytes   the base to write where no other worker serves it; '': only beside others is it joined
--       beside       bytes   the base to write beside other workers of it; '': the base of that name is not the caller's
--       fleet...     str     the names of the fleet's bases, its own among them, if it has several
-- Reply: str, 'joined'; 'refused'; 'full': there are as many bases as may be; 'alone': no other worker serves it, and
-- `alone` is ''; 'other': live workers serve other bases only, and `fleet` is empty; 'old': live workers of an earlier
-- version know of one base only; or 'changed': the bases are not as read, and the caller reads them again.
local base, bases, workers, worker_beat = unpack(KEYS, 2)
local wid, beat, ttl_ms, at_ms, name, first_base, further, alone, beside = unpack(ARGV, 1, 9)
local first, is_known = 10, {}
local has_several = #ARGV >= first
for i = first, #ARGV do is_known[ARGV[i]] = true end
local MOST = 31
if (redis.call('GET', base) or '') ~= first_base or (redis.call('HGET', bases, name) or '') ~= further then
  return 'changed'
end
local first_name = first_base == '' and name or cmsgpack.unpack(first_base).name
local is_first = first_name == name
local field = '\164base'  -- as heartbeats have it: no whole one, of megabytes in all, need be decoded
local own_field = field .. cmsgpack.pack(name)
local has_workers, has_own, has_old = false, false, false
for _, other in ipairs(redis.call('ZRANGE', workers, 0, -1)) do
  local raw = other ~= wid and redis.call('GET', (string.gsub(worker_beat, wid, other)))
  if raw then
    has_workers = true
    local is_old = false
    if not string.find(raw, field, 1, true) then
      local is_read, found = pcall(cmsgpack.unpack, raw)
      is_old = is_read and type(found) == 'table' and found.wid ~= nil
    end
    has_old = has_old or is_old
    has_own = string.find(raw, own_field, 1, true) ~= nil or (is_old and is_first)
    if has_own then break end
  end
end
if has_own and beside == '' then return 'refused' end
local served = has_own and beside or alone
if served == '' then return 'alone' end
if has_old and not has_own then return 'old' end
if has_workers and not has_own and not has_several then return 'other' end
if not is_first and further == '' and not has_workers then
  for _, other in ipairs(redis.call('HKEYS', bases)) do
    if string.byte(other) ~= 0 and not is_known[other] then redis.call('HDEL', bases, other) end
  end
  is_first = not is_known[first_name]
end
if is_first then
  redis.call('SET', base, served)
else
  local num = 0
  for _, other in ipairs(further == '' and redis.call('HKEYS', bases) or {}) do
    if string.byte(other) ~= 0 then num = num + 1 end
  end
  if num >= MOST then return 'full' end
  redis.call('HSET', bases, name, served)
end
redis.call('HDEL', bases, '\0' .. name)
redis.call('SET', worker_beat, beat, 'PX', ttl_ms)
redis.call('ZADD', workers, at_ms, wid)
return 'joined'
