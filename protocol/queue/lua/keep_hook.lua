#!lua
-- Write an endpoint of webhooks: a new one, unless its tenant has too many, or one that is still there.
--
-- KEYS  hooks   hash   the tenant's endpoints
-- ARGV  id      str    id of the endpoint
--       record  bytes  `messages.WebhookEndpoint`, msgpack
--       most    int    most endpoints that a new one makes; 0: it is none
-- Reply: int, 1 when it is written, also when it was: an earlier reply was lost.
local hooks = unpack(KEYS, 2)
local id, record, most = unpack(ARGV)
if redis.call('HEXISTS', hooks, id) == 0 and redis.call('HLEN', hooks) >= tonumber(most) then return 0 end
redis.call('HSET', hooks, id, record)
return 1
