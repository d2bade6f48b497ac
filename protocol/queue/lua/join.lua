-- Register a worker with its first beat, unless live workers serve another model.
-- KEYS: prefix, base model, registry of workers, the worker's beat
-- ARGV: id, beat, its life in ms, now in ms, the base model as the caller read it ('' if none), '1' if it is the caller's
--       own, base model to write where no other worker lives, base model to write beside others
-- -> 'joined', 'refused', or 'changed': the base model is not as read, the caller reads it again
if (redis.call('GET', KEYS[2]) or '') ~= ARGV[5] then return 'changed' end
local served = ARGV[7]
for _, wid in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do
  local beat = string.gsub(KEYS[4], ARGV[1], wid)  -- an id has letters and digits only
  if wid ~= ARGV[1] and redis.call('EXISTS', beat) == 1 then
    if ARGV[6] ~= '1' then return 'refused' end
    served = ARGV[8]
  end
end
redis.call('SET', KEYS[2], served)
redis.call('SET', KEYS[4], ARGV[2], 'PX', ARGV[3])
redis.call('ZADD', KEYS[3], ARGV[4], ARGV[1])
return 'joined'
