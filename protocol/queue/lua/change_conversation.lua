#!lua
-- Make or change a conversation: its record, and what is added to its items. All of it, or nothing.
--
-- KEYS  conversation       hash   the conversation
--       items              hash   its items
--       order              zset   item ids by number
--       turns              zset   responses to be added to it
--       conversations      zset   its tenant's conversations by time of expiry
--       all_turns          zset   responses to be added to any conversation, by time of the next check
-- ARGV  id                 str    id of the conversation
--       tenant             str    its tenant
--       record             bytes  `messages.Conversation`, msgpack; '': keep the stored one
--       is_new             int    1: create it, else 0
--       ttl_ms             int    ms until it expires, from now
--       max_conversations  int    maximum number of the tenant's conversations, 0: no limit
--       max_items          int    maximum number of its items
--       max_bytes          int    maximum size of it in bytes
--       max_kept           int    maximum bytes that the tenant may keep in the queue, 0: no limit
--       response           str    the response whose turn the items are, which is added once regardless of limits; ''
--                                 if they are not a turn
--       new_items...       list   per item: item_id (str), item (bytes). Existing items are not changed.
-- Reply: array. {'ok'}; {'gone'}: the tenant has no such conversation. If a limit refuses the change, that limit with
--        its current value: {'conversations' | 'items' | 'bytes', number (int)}, {'kept', bytes, added bytes (int)}
local conversation, items, order, turns, conversations, all_turns = unpack(KEYS, 2)
local id, tenant, record, is_new, ttl_ms, max_conversations, max_items, max_bytes, max_kept, response =
  unpack(ARGV, 1, 10)
is_new, max_conversations, max_kept = is_new == '1', tonumber(max_conversations), tonumber(max_kept)
local first, record_bytes, item_bytes, now = 11, 1024, 256, now_ms()
local f = redis.call('HMGET', conversation, 'tenant', 'bytes', 'next', 'b')
if response ~= '' then redis.call('ZREM', all_turns, tenant .. ':' .. id .. ':' .. response) end
if is_new and f[1] then return {'ok'} end  -- an earlier reply was lost
if not is_new and f[1] ~= tenant then return {'gone'} end
-- Only the caller that removes the response adds its turn, so the turn is added once.
if response ~= '' and redis.call('ZREM', turns, response) == 0 then return {'ok'} end

local num, added = 0, record == '' and 0 or #record - #(f[4] or '')
if is_new then added = added + record_bytes end
for a = first, #ARGV, 2 do
  local item_id, item = unpack(ARGV, a, a + 1)
  if redis.call('HEXISTS', items, item_id) == 0 then num, added = num + 1, added + #item + item_bytes end
end
local bytes = tonumber(f[2] or 0)
if response == '' and added > 0 then
  if is_new and max_conversations > 0 then
    redis.call('ZREMRANGEBYSCORE', conversations, '-inf', now)
    local have = redis.call('ZCARD', conversations)
    if have >= max_conversations then return {'conversations', have} end
  end
  local have = redis.call('ZCARD', order)
  if num > 0 and have + num > tonumber(max_items) then return {'items', have} end
  if num > 0 and bytes + added > tonumber(max_bytes) then return {'bytes', bytes} end
  local kept = kept_bytes(tenant, now)
  if max_kept > 0 and kept + added > max_kept then return {'kept', kept, added} end
end

local number = tonumber(f[3] or 0)
for a = first, #ARGV, 2 do
  local item_id, item = unpack(ARGV, a, a + 1)
  if redis.call('HSETNX', items, item_id, item) == 1 then
    redis.call('ZADD', order, number, item_id)
    number = number + 1
  end
end
redis.call('HSET', conversation, 'tenant', tenant, 'bytes', bytes + added, 'next', number)
if record ~= '' then redis.call('HSET', conversation, 'b', record) end
local to = now + tonumber(ttl_ms)
for _, key in ipairs({conversation, items, order, turns}) do redis.call('PEXPIREAT', key, to) end
redis.call('ZADD', conversations, to, id)
if redis.call('PEXPIRETIME', conversations) < to then redis.call('PEXPIREAT', conversations, to) end
if f[2] then give_back(tenant, id, f[2]) end
keep(tenant, id, bytes + added, to)
return {'ok'}
