#!lua flags=allow-oom
-- Register a worker under its base's name with its first heartbeat, unless something has changed since the caller
-- decided: the records of the first base and of its own, or a worker that has registered. Workers that have left since
-- do not count: fewer workers refuse no more.
--
-- KEYS  base         string  the first base, as messages.ServedModel
--       bases        hash    name -> each further base; NUL name -> why no worker of a base has started
--       workers      zset    worker id -> unix ms of its last heartbeat
--       worker_beat  string  the worker's heartbeat
-- ARGV  wid          str     the worker's id
--       beat         bytes   its heartbeat
--       ttl_ms       int     ms until the heartbeat expires
--       at_ms        int     current unix ms
--       name         str     name of its base
--       first_base   bytes   record of the first base as read by the caller; '' if there was none
--       further      bytes   record of the further base of that name as read by the caller; '' if there was none
--       served       bytes   record to write
--       is_first     int     1: write it as the first base; 0: as a further one
--       num_others   int     number of worker ids in `more`
--       more...      str     ids of the registered workers, then names of further bases to delete
-- Reply: str, 'joined' or 'changed'.
local base, bases, workers, worker_beat = unpack(KEYS, 2)
local wid, beat, ttl_ms, at_ms, name, first_base, further, served, is_first, num_others = unpack(ARGV, 1, 10)
local first, is_known = 11, {[wid] = true}
for i = first, first + num_others - 1 do is_known[ARGV[i]] = true end
if (redis.call('GET', base) or '') ~= first_base or (redis.call('HGET', bases, name) or '') ~= further then
  return 'changed'
end
for _, other in ipairs(redis.call('ZRANGE', workers, 0, -1)) do
  if not is_known[other] then return 'changed' end
end
redis.call('HDEL', bases, '\0' .. name, unpack(ARGV, first + num_others))
if is_first == '1' then redis.call('SET', base, served) else redis.call('HSET', bases, name, served) end
redis.call('SET', worker_beat, beat, 'PX', ttl_ms)
redis.call('ZADD', workers, at_ms, wid)
return 'joined'
