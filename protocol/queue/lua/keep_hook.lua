#!lua
-- Write an endpoint of webhooks: a new one, unless its tenant has too many, or one that is still there.
--
-- KEYS[1]  string  prefix of the shard's keys
-- KEYS[2]  hash    the tenant's endpoints
-- ARGV[1]  str     id of the endpoint
-- ARGV[2]  bytes   `messages.WebhookEndpoint`, msgpack
-- ARGV[3]  int     most endpoints that a new one makes; 0: it is none
-- Reply: int, 1 when it is written, also when it was: an earlier reply was lost.
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 and redis.call('HLEN', KEYS[2]) >= tonumber(ARGV[3]) then return 0 end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return 1
