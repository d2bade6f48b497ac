#!lua
-- Note a delivery, due now, unless its tenant has too many that wait; it is no longer one that was given up.
--
-- KEYS[1]  string  prefix of the shard's keys
-- KEYS[2]  hash    all deliveries
-- KEYS[3]  zset    the times of their next attempts
-- KEYS[4]  set     its tenant's deliveries that wait
-- KEYS[5]  hash    its tenant's deliveries that were given up
-- ARGV[1]  str     id of the delivery
-- ARGV[2]  bytes   `messages.Delivery`, msgpack
-- ARGV[3]  int     most deliveries of its tenant that wait
-- ARGV[4]  int     s that the set lives
-- Reply: int, -1 when it is noted, also when it was: an earlier reply was lost; else the deliveries that wait.
if redis.call('SADD', KEYS[4], ARGV[1]) == 1 and redis.call('SCARD', KEYS[4]) > tonumber(ARGV[3]) then
  redis.call('SREM', KEYS[4], ARGV[1])
  return redis.call('SCARD', KEYS[4])
end
redis.call('EXPIRE', KEYS[4], ARGV[4])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[3], now_ms(), ARGV[1])
redis.call('HDEL', KEYS[5], ARGV[1])
return -1
