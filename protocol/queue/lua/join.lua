#!lua flags=allow-oom
-- Register a worker under its base's name with its first heartbeat, unless something has changed since the caller
-- decided: the record of its base, or a worker that has registered. Workers that have left since do not count: fewer
-- workers refuse no more.
--
-- KEYS  bases        hash    name -> each base, as messages.ServedModel; NUL name -> why no worker of it has started
--       workers      zset    worker id -> unix ms of its last heartbeat
--       worker_beat  string  the worker's heartbeat
-- ARGV  wid          str     the worker's id
--       beat         bytes   its heartbeat
--       ttl_ms       int     ms until the heartbeat expires
--       at_ms        int     current unix ms
--       name         str     name of its base
--       known        bytes   record of the base of that name as read by the caller; '' if there was none
--       served       bytes   record to write
--       num_others   int     number of worker ids in `more`
--       more...      str     ids of the registered workers, then names of bases to delete
-- Reply: str, 'joined' or 'changed'.
local bases, workers, worker_beat = unpack(KEYS, 2)
local wid, beat, ttl_ms, at_ms, name, known, served, num_others = unpack(ARGV, 1, 8)
local first, is_known = 9, {[wid] = true}
for i = first, first + num_others - 1 do is_known[ARGV[i]] = true end
if (redis.call('HGET', bases, name) or '') ~= known then return 'changed' end
for _, other in ipairs(redis.call('ZRANGE', workers, 0, -1)) do
  if not is_known[other] then return 'changed' end
end
redis.call('HDEL', bases, '\0' .. name, unpack(ARGV, first + num_others))
redis.call('HSET', bases, name, served)
redis.call('SET', worker_beat, beat, 'PX', ttl_ms)
redis.call('ZADD', workers, at_ms, wid)
return 'joined'
