#!lua
-- Write a webhook endpoint: a new one, unless its tenant has too many, or an existing one.
--
-- KEYS  hooks   hash   the tenant's endpoints
-- ARGV  id      str    id of the endpoint
--       record  bytes  `messages.WebhookEndpoint`, msgpack
--       most    int    a new one is written if there are fewer than this; 0: it is not a new one
-- Reply: int, 1 if it is written, also by an earlier call whose reply was lost; else 0.
local hooks = unpack(KEYS, 2)
local id, record, most = unpack(ARGV)
if redis.call('HEXISTS', hooks, id) == 0 and redis.call('HLEN', hooks) >= tonumber(most) then return 0 end
redis.call('HSET', hooks, id, record)
return 1
