#!lua flags=allow-oom
-- Register a worker with its first beat, unless live workers serve another model.
--
-- KEYS[1]  string  prefix of the shard's keys
-- KEYS[2]  string  the base model, as messages.ServedModel
-- KEYS[3]  zset    worker id -> unix ms of its last beat
-- KEYS[4]  string  the worker's beat; the key holds its id
-- ARGV[1]  str     the worker's id: letters and digits
-- ARGV[2]  bytes   its beat
-- ARGV[3]  int     ms that the beat lasts
-- ARGV[4]  int     unix ms now
-- ARGV[5]  bytes   the base model as the caller read it; '' if there was none
-- ARGV[6]  str     '1' if that is the caller's own model
-- ARGV[7]  bytes   the base model to write where no other worker lives
-- ARGV[8]  bytes   the base model to write beside other workers
-- Reply: str, 'joined'; 'refused'; or 'changed': the base model is not as read, and the caller reads it again.
if (redis.call('GET', KEYS[2]) or '') ~= ARGV[5] then return 'changed' end
local served = ARGV[7]
for _, wid in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do
  local beat = string.gsub(KEYS[4], ARGV[1], wid)
  if wid ~= ARGV[1] and redis.call('EXISTS', beat) == 1 then
    if ARGV[6] ~= '1' then return 'refused' end
    served = ARGV[8]
  end
end
redis.call('SET', KEYS[2], served)
redis.call('SET', KEYS[4], ARGV[2], 'PX', ARGV[3])
redis.call('ZADD', KEYS[3], ARGV[4], ARGV[1])
return 'joined'
