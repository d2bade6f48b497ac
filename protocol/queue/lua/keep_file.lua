#!lua flags=allow-oom
-- Note a file, whose bytes are in the gateways' storage, or hold room for one that is being written there, unless its
-- tenant has too much. Room is held until the file is noted, or dropped by the sweep of what has expired. It runs while
-- the memory is full: a batch that may write its answers lets the queue forget their requests. A record is small, and
-- their number is limited.
--
-- KEYS[1]  string  prefix of the shard's keys
-- KEYS[2]  string  the file's record
-- KEYS[3]  zset    its tenant's files by creation time
-- KEYS[4]  hash    sizes of its tenant's files, and of those that room is held for
-- KEYS[5]  zset    all of these by the time when they expire
-- ARGV[1]  str     id of the file
-- ARGV[2]  str     its tenant
-- ARGV[3]  bytes   `messages.File`, msgpack; '': hold room alone
-- ARGV[4]  int     its bytes
-- ARGV[5]  int     unix ms when it was made
-- ARGV[6]  int     unix ms when it expires
-- ARGV[7]  int     most bytes of the tenant's files, 0: no limit
-- ARGV[8]  int     most files of the tenant, 0: no limit
-- Reply: array. {'ok'}, also when it is known: an earlier reply was lost; {'bytes', bytes that the tenant has beside it
--        (int)}; {'files', files that it has beside it (int)}
if redis.call('EXISTS', KEYS[2]) == 1 then return {'ok'} end
local num_bytes, expires, max_bytes, max_files = tonumber(ARGV[4]), tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local held = redis.call('HGET', KEYS[4], ARGV[1])
local sum = tonumber(redis.call('HGET', KEYS[4], 'sum') or 0) - tonumber(held or 0)
local num = math.max(redis.call('HLEN', KEYS[4]) - 1, 0) - (held and 1 or 0)
if max_bytes > 0 and sum + num_bytes > max_bytes then return {'bytes', sum} end
if max_files > 0 and num >= max_files then return {'files', num} end
if ARGV[3] ~= '' then
  redis.call('SET', KEYS[2], ARGV[3], 'PXAT', expires)
  redis.call('ZADD', KEYS[3], ARGV[5], ARGV[1])
end
redis.call('HSET', KEYS[4], ARGV[1], num_bytes, 'sum', sum + num_bytes)
-- Until the sweep has taken the last one out.
for _, key in ipairs({KEYS[3], KEYS[4]}) do
  if redis.call('PEXPIRETIME', key) < expires + 3600000 then redis.call('PEXPIREAT', key, expires + 3600000) end
end
redis.call('ZADD', KEYS[5], expires, ARGV[2] .. ':' .. ARGV[1])
return {'ok'}
