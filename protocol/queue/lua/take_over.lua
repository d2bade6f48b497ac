#!lua flags=allow-oom
-- Move what the previous version kept for all tenants together to each tenant: endpoints, ends and deliveries.
--
-- ARGV  num  int  approximate maximum of each kind to move
-- Reply: list of the ids of deliveries that could not be read and were dropped.
local num = unpack(ARGV)
local hooks, ends, cursor = P .. ':webhooks', P .. ':events', P .. ':events:cursor'
local all, times, lost = P .. ':deliveries', P .. ':deliveries:due', {}

local at, found = '0', {}
repeat  -- parts of a hash that were emptied before return nothing
  at, found = unpack(redis.call('HSCAN', hooks, at, 'COUNT', num))
until #found > 0 or at == '0'
for i = 1, #found, 2 do
  local tenant, id = string.match(found[i], '^(.*):([^:]*)$')
  if tenant then redis.call('HSETNX', P .. ':hooks:' .. tenant, id, found[i + 1]) end
  redis.call('HDEL', hooks, found[i])
end

local due = redis.call('ZRANGE', times, 0, num - 1, 'WITHSCORES')
if #due == 0 then redis.call('UNLINK', all) end
for i = 1, #due, 2 do
  local id, due_ms, raw = due[i], due[i + 1], redis.call('HGET', all, due[i])
  local is_read, delivery = pcall(cmsgpack.unpack, raw or '')
  local tenant = is_read and type(delivery) == 'table' and delivery.tenant
  if type(tenant) == 'string' then
    if redis.call('HSETNX', P .. ':outbox:' .. tenant, id, raw) == 1 then
      redis.call('ZADD', P .. ':outbox-due:' .. tenant, due_ms, id)
      redis.call('ZADD', P .. ':outboxes', 'LT', due_ms, tenant)
    end
  elseif raw then
    lost[#lost + 1] = id
  end
  redis.call('HDEL', all, id)
  redis.call('ZREM', times, id)
end

local last = redis.call('GET', cursor) or '0'
local entries = redis.call('XRANGE', ends, '(' .. last, '+', 'COUNT', num)
for _, entry in ipairs(entries) do
  local end_ = {}
  for i = 1, #entry[2], 2 do end_[entry[2][i]] = entry[2][i + 1] end
  -- An entry that names no tenant would stop the script, and with it all webhooks.
  if end_.tenant and end_.id then tell_end(end_.tenant, end_.id, end_.type or '') end
  redis.call('SET', cursor, entry[1])
end
if #entries == 0 then redis.call('UNLINK', ends, cursor) end
return lost
