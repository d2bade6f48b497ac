#!lua flags=allow-oom
-- Delete a conversation, or one of its items, and give its tenant the bytes back.
--
-- KEYS[1]  string  prefix of the shard's keys
-- KEYS[2]  hash    the conversation
-- KEYS[3]  hash    its items
-- KEYS[4]  zset    their ids by number
-- KEYS[5]  zset    responses that are to be added to it
-- KEYS[6]  zset    its tenant's conversations by when they expire
-- ARGV[1]  str     id of the conversation
-- ARGV[2]  str     its tenant
-- ARGV[3]  str     id of the item; '' for all of it
-- Reply: int, 1 if it was there, else 0.
local id, tenant, item, item_bytes = ARGV[1], ARGV[2], ARGV[3], 256
local f = redis.call('HMGET', KEYS[2], 'tenant', 'bytes')
if f[1] ~= tenant then return 0 end
if item == '' then
  give_back(tenant, id, f[2])
  redis.call('ZREM', KEYS[6], id)
  redis.call('UNLINK', KEYS[2], KEYS[3], KEYS[4], KEYS[5])
  return 1
end
local found = redis.call('HGET', KEYS[3], item)
if not found then return 0 end
redis.call('HDEL', KEYS[3], item)
redis.call('ZREM', KEYS[4], item)
local left = f[2] - #found - item_bytes
redis.call('HSET', KEYS[2], 'bytes', left)
give_back(tenant, id, f[2])
keep(tenant, id, left, redis.call('PEXPIRETIME', KEYS[2]))
return 1
