#!lua flags=allow-oom
-- Register a worker under its base's name with its first beat, if nothing has changed since it was decided: neither the
-- record of its base, nor who is registered. Workers that have left since change nothing: fewer of them refuse no more.
--
-- KEYS  bases        hash    name -> each base, as messages.ServedModel; NUL name -> why no worker of it has started
--       workers      zset    worker id -> unix ms of its last heartbeat
--       worker_beat  string  the worker's heartbeat
-- ARGV  wid          str     the worker's id
--       beat         bytes   its heartbeat
--       ttl_ms       int     ms that the heartbeat lasts
--       at_ms        int     unix ms now
--       name         str     its base's name
--       known        bytes   the base of that name as the caller read it; '' if there was none
--       served       bytes   the base to write
--       num_others   int     number of the following ids
--       more...      str     ids of workers that were registered; then names of bases that go
-- Reply: str, 'joined', or 'changed'.
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
