#!lua flags=allow-oom
-- Register a worker with its first beat, unless live workers serve another model.
--
-- KEYS  base         string  the base model, as messages.ServedModel
--       workers      zset    worker id -> unix ms of its last heartbeat
--       worker_beat  string  the worker's heartbeat; the key holds its id
-- ARGV  wid          str     the worker's id: letters and digits
--       beat         bytes   its heartbeat
--       ttl_ms       int     ms that the heartbeat lasts
--       at_ms        int     unix ms now
--       known        bytes   the base model as the caller read it; '' if there was none
--       is_same      int     1 if that is the caller's own model, else 0
--       alone        bytes   the base model to write where no other worker lives
--       beside       bytes   the base model to write beside other workers
-- Reply: str, 'joined'; 'refused'; or 'changed': the base model is not as read, and the caller reads it again.
local base, workers, worker_beat = unpack(KEYS, 2)
local wid, beat, ttl_ms, at_ms, known, is_same, alone, beside = unpack(ARGV)
if (redis.call('GET', base) or '') ~= known then return 'changed' end
local served = alone
for _, other in ipairs(redis.call('ZRANGE', workers, 0, -1)) do
  local other_beat = string.gsub(worker_beat, wid, other)
  if other ~= wid and redis.call('EXISTS', other_beat) == 1 then
    if is_same ~= '1' then return 'refused' end
    served = beside
  end
end
redis.call('SET', base, served)
redis.call('SET', worker_beat, beat, 'PX', ttl_ms)
redis.call('ZADD', workers, at_ms, wid)
return 'joined'
