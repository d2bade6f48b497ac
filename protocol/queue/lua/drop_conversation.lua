#!lua flags=allow-oom
-- Delete a conversation, or one of its items, and give its tenant the bytes back.
--
-- KEYS  conversation   hash  the conversation
--       items          hash  its items
--       order          zset  item ids by number
--       turns          zset  responses to be added to it
--       conversations  zset  its tenant's conversations by time of expiry
-- ARGV  id             str   id of the conversation
--       tenant         str   its tenant
--       item_id        str   id of the item; '' for the whole conversation
-- Reply: int, 1 if it existed, else 0.
local conversation, items, order, turns, conversations = unpack(KEYS, 2)
local id, tenant, item_id = unpack(ARGV)
local item_bytes = 256
local f = redis.call('HMGET', conversation, 'tenant', 'bytes')
if f[1] ~= tenant then return 0 end
if item_id == '' then
  give_back(tenant, id, f[2])
  redis.call('ZREM', conversations, id)
  redis.call('UNLINK', conversation, items, order, turns)
  return 1
end
local found = redis.call('HGET', items, item_id)
if not found then return 0 end
redis.call('HDEL', items, item_id)
redis.call('ZREM', order, item_id)
local left = f[2] - #found - item_bytes
redis.call('HSET', conversation, 'bytes', left)
give_back(tenant, id, f[2])
keep(tenant, id, left, redis.call('PEXPIRETIME', conversation))
return 1
