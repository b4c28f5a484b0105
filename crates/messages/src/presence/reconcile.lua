
local head = redis.call('HMGET', KEYS[1], 'born', 'reconciled')
if head[1] ~= ARGV[1] or head[2] == ARGV[1] then return false end
local made = {}
for i = 4, #KEYS do
  local key, at = KEYS[i], 3 * i - 9
  local name, published, published_state = ARGV[at], tonumber(ARGV[at + 1]), ARGV[at + 2]
  local is = redis.call('HMGET', key, 'state', 'version')
  local state, version = is[1] or 'disconnected', tonumber(is[2] or 0)
  local known = state == 'connected' or state == 'disconnected'
  if known and version < published and state ~= published_state then
    version = math.max(published + 1, now)
    local connections = 0
    if state == 'connected' then
      local fields = redis.call('HGETALL', key)
      for field = 1, #fields, 2 do
        if string.sub(fields[field], 1, 2) == 'p:' then connections = connections + tonumber(fields[field + 1]) end
      end
      connections = math.max(connections, 1)
    end
    if is[1] then
      redis.call('HSET', key, 'version', version)
    else
      redis.call('HSET', key, 'state', state, 'version', version, 'since', 0, 'seen', now)
      redis.call('EXPIRE', key, ARGV[2])
      redis.call('HINCRBY', KEYS[3], string.format('%d', math.floor((now / 1000 + ARGV[2]) / 86400)), 1)
    end
    made[#made + 1] = record_due(KEYS[2], name, version, state, connections)
  elseif known and version < published and is[1] then
    redis.call('HSET', key, 'version', published)
  end
end
return made
