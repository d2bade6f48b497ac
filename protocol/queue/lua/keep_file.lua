#!lua flags=allow-oom
-- Note a file, whose bytes are in the gateways' storage, or hold room for one that is being written there, unless its
-- tenant has too much. Room is held until the file is noted, or dropped by the sweep of what has expired. It runs while
-- the memory is full: a batch that may write its answers lets the queue forget their requests. A record is small, and
-- their number is limited.
--
-- KEYS  file        string  the file's record
--       files       zset    its tenant's files by creation time
--       sizes       hash    sizes of its tenant's files, and of those that room is held for
--       expiry      zset    all of these by the time when they expire
-- ARGV  id          str     id of the file
--       tenant      str     its tenant
--       record      bytes   `messages.File`, msgpack; '': hold room alone
--       num_bytes   int     its bytes
--       created_ms  int     unix ms when it was made
--       expires_ms  int     unix ms when it expires
--       max_bytes   int     most bytes of the tenant's files, 0: no limit
--       max_files   int     most files of the tenant, 0: no limit
-- Reply: array. {'ok'}, also when it is known: an earlier reply was lost; {'bytes', bytes that the tenant has beside it
--        (int)}; {'files', files that it has beside it (int)}
local file, files, sizes, expiry = unpack(KEYS, 2)
local id, tenant, record, num_bytes, created_ms, expires_ms, max_bytes, max_files = unpack(ARGV)
if redis.call('EXISTS', file) == 1 then return {'ok'} end
num_bytes, expires_ms = tonumber(num_bytes), tonumber(expires_ms)
max_bytes, max_files = tonumber(max_bytes), tonumber(max_files)
local held = redis.call('HGET', sizes, id)
local sum = tonumber(redis.call('HGET', sizes, 'sum') or 0) - tonumber(held or 0)
local num = math.max(redis.call('HLEN', sizes) - 1, 0) - (held and 1 or 0)
if max_bytes > 0 and sum + num_bytes > max_bytes then return {'bytes', sum} end
if max_files > 0 and num >= max_files then return {'files', num} end
if record ~= '' then
  redis.call('SET', file, record, 'PXAT', expires_ms)
  redis.call('ZADD', files, created_ms, id)
end
redis.call('HSET', sizes, id, num_bytes, 'sum', sum + num_bytes)
-- Until the sweep has taken the last one out.
for _, key in ipairs({files, sizes}) do
  if redis.call('PEXPIRETIME', key) < expires_ms + 3600000 then redis.call('PEXPIREAT', key, expires_ms + 3600000) end
end
redis.call('ZADD', expiry, expires_ms, tenant .. ':' .. id)
return {'ok'}
