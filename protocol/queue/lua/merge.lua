-- Bring the logs of running requests up to date with what their workers have written.
-- KEYS: prefix
-- ARGV: rids
for _, rid in ipairs(ARGV) do
  local f = redis.call('HMGET', req_key(rid), 'state', 'owner')
  if f[1] == 'assigned' then merge_journal(journal_key(f[2])) end
end
