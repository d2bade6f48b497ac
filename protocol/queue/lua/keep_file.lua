#!lua flags=allow-oom
-- Record a file, whose bytes are in the gateways' storage, or reserve space for one that is being written there, unless
-- its tenant exceeds a limit. Space is reserved until the file is recorded, or its reservation expires and is swept.
-- The script runs even while the memory is full: a batch that can write its answers lets the queue delete its requests.
-- Records are small and limited in number.
--
-- KEYS  file        string  the file's record
--       files       zset    its tenant's files by creation time
--       sizes       hash    sizes of its tenant's files and reservations
--       expiry      zset    all files and reservations by time of expiry
-- ARGV  id          str     id of the file
--       tenant      str     its tenant
--       record      bytes   `messages.File`, msgpack; '': only reserve space
--       num_bytes   int     size in bytes
--       created_ms  int     unix ms of creation
--       expires_ms  int     unix ms of expiry
--       max_bytes   int     maximum bytes of the tenant's files, 0: no limit
--       max_files   int     maximum number of the tenant's files, 0: no limit
-- Reply: array. {'ok'}, also if it is already recorded, since an earlier reply may have been lost; {'bytes', bytes of
--        the tenant's other files (int)}; {'files', number of its other files (int)}
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
-- These live until the sweep has removed the last file.
for _, key in ipairs({files, sizes}) do
  if redis.call('PEXPIRETIME', key) < expires_ms + 3600000 then redis.call('PEXPIREAT', key, expires_ms + 3600000) end
end
redis.call('ZADD', expiry, expires_ms, tenant .. ':' .. id)
return {'ok'}
