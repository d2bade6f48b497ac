#!lua
-- Make or change a conversation: its record, and what is added to its items. All of it, or nothing.
--
-- KEYS[1]  string  prefix of the shard's keys
-- KEYS[2]  hash    the conversation
-- KEYS[3]  hash    its items
-- KEYS[4]  zset    their ids by number
-- KEYS[5]  zset    responses that are to be added to it
-- KEYS[6]  zset    its tenant's conversations by when they expire
-- KEYS[7]  zset    all responses that are to be added, by when to look
-- ARGV[1]  str     id of the conversation
-- ARGV[2]  str     its tenant
-- ARGV[3]  bytes   `messages.Conversation`, msgpack; '' for the one that it has
-- ARGV[4]  int     1: it is new, else 0
-- ARGV[5]  int     ms that it lives from now on
-- ARGV[6]  int     most conversations of the tenant, 0: no limit
-- ARGV[7]  int     most items of it
-- ARGV[8]  int     most bytes of it
-- ARGV[9]  int     most bytes that the tenant may keep in the queue, 0: no limit
-- ARGV[10] str     the response whose turn the items are, added once and whatever the limits; '' if they are none
-- ARGV[11...]      per item, 2 values: its id (str), the item (bytes). Those that it has are left as they are.
-- Reply: array. {'ok'}; {'gone'}: the tenant has no such conversation. When nothing is changed, what there is of which
--        limit: {'conversations' | 'items' | 'bytes', number (int)}, {'kept', number (int), bytes that it adds (int)}
local id, tenant, record, is_new, response = ARGV[1], ARGV[2], ARGV[3], ARGV[4] == '1', ARGV[10]
local record_bytes, item_bytes, first, now = 1024, 256, 11, now_ms()
local f = redis.call('HMGET', KEYS[2], 'tenant', 'bytes', 'next', 'b')
if response ~= '' then redis.call('ZREM', KEYS[7], tenant .. ':' .. id .. ':' .. response) end
if is_new and f[1] then return {'ok'} end  -- an earlier reply was lost
if not is_new and f[1] ~= tenant then return {'gone'} end
-- Whoever takes the response out adds its turn: nobody does so twice.
if response ~= '' and redis.call('ZREM', KEYS[5], response) == 0 then return {'ok'} end

local num, added = 0, record == '' and 0 or #record - #(f[4] or '')
if is_new then added = added + record_bytes end
for a = first, #ARGV, 2 do
  if redis.call('HEXISTS', KEYS[3], ARGV[a]) == 0 then num, added = num + 1, added + #ARGV[a + 1] + item_bytes end
end
local bytes = tonumber(f[2] or 0)
if response == '' and added > 0 then
  local max_conversations, max_kept = tonumber(ARGV[6]), tonumber(ARGV[9])
  if is_new and max_conversations > 0 then
    redis.call('ZREMRANGEBYSCORE', KEYS[6], '-inf', now)
    local have = redis.call('ZCARD', KEYS[6])
    if have >= max_conversations then return {'conversations', have} end
  end
  local items = redis.call('ZCARD', KEYS[4])
  if num > 0 and items + num > tonumber(ARGV[7]) then return {'items', items} end
  if num > 0 and bytes + added > tonumber(ARGV[8]) then return {'bytes', bytes} end
  local kept = kept_bytes(tenant, now)
  if max_kept > 0 and kept + added > max_kept then return {'kept', kept, added} end
end

local number = tonumber(f[3] or 0)
for a = first, #ARGV, 2 do
  if redis.call('HSETNX', KEYS[3], ARGV[a], ARGV[a + 1]) == 1 then
    redis.call('ZADD', KEYS[4], number, ARGV[a])
    number = number + 1
  end
end
redis.call('HSET', KEYS[2], 'tenant', tenant, 'bytes', bytes + added, 'next', number)
if record ~= '' then redis.call('HSET', KEYS[2], 'b', record) end
local to = now + tonumber(ARGV[5])
for i = 2, 5 do redis.call('PEXPIREAT', KEYS[i], to) end
redis.call('ZADD', KEYS[6], to, id)
if redis.call('PEXPIRETIME', KEYS[6]) < to then redis.call('PEXPIREAT', KEYS[6], to) end
if f[2] then give_back(tenant, id, f[2]) end
keep(tenant, id, bytes + added, to)
return {'ok'}
