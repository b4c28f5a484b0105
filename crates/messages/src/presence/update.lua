local marker = redis.call('HGET', KEYS[2], '') or '0'
if marker ~= ARGV[2] then return false end
local field = 'p:' .. ARGV[1]
local head = redis.call('HMGET', KEYS[1], 'born', 'reconciled')
local young = now - tonumber(head[1]) < tonumber(ARGV[5]) or head[2] ~= head[1]
if marker ~= 'taken' then
  redis.call('HSETNX', KEYS[1], field, now)
  redis.call('HINCRBY', KEYS[2], '', 1)
end
local counts, remembered = {}, nil
local function note(seconds, change)
  local day = string.format('%d', math.floor((now / 1000 + seconds) / 86400))
  counts[day] = (counts[day] or 0) + change
  if remembered then remembered = remembered + change end
end
local function has_room()
  if ARGV[6] == '0' then return true end
  if not remembered then
    remembered = 0
    local pairs_of = redis.call('HGETALL', KEYS[4])
    for i = 1, #pairs_of, 2 do
      if tonumber(pairs_of[i]) >= math.floor(now / 86400000) then
        remembered = remembered + tonumber(pairs_of[i + 1])
      else
        redis.call('HDEL', KEYS[4], pairs_of[i])
      end
    end
    for _, change in pairs(counts) do remembered = remembered + change end
  end
  return remembered < tonumber(ARGV[6])
end
local found = {}
for i = 5, #KEYS do
  local key, at = KEYS[i], 4 * i - 13
  local name, count = ARGV[at], tonumber(ARGV[at + 1])
  local version, since = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  local is = redis.call('HMGET', key, 'state', 'version', 'since', 'seen', field)
  local state, seen, change = 'connected', tonumber(is[4] or 0), 0
  local known = not is[1] or is[1] == 'connected' or is[1] == 'disconnected'
  local held, missed = is[2] or '0', ''
  if known and tonumber(held) > version and (is[5] or count < 0 or version > 0) then
    missed = redis.call('HGET', KEYS[3], held .. ' ' .. name) or redis.call('HGET', KEYS[3], ' ' .. name) or ''
  end
  if not known then
    version, since, change = 0, 0, 3
  elseif is[1] and tonumber(is[2]) >= version then
    state, version, since = is[1], tonumber(is[2]), tonumber(is[3])
  elseif version == 0 then
    state = 'unknown'
  end
  if count == 0 and state ~= 'connected' then count = -1 end
  if known and count >= 0 then
    if version == 0 and (young or count == 0) then
      if state ~= 'connected' then state, since = 'connected', now end
    elseif state ~= 'connected' or version == 0 then
      state, version, since, change = 'connected', math.max(version + 1, now), now, 1
    end
    if count == 0 then seen = now end
    redis.call('HSET', key, 'state', state, 'version', version, 'since', since, 'seen', seen, field, count)
    if is[1] == 'disconnected' then
      local left = redis.call('TTL', key)
      if left > 60 then note(left, -1) end
      redis.call('PERSIST', key)
    end
    redis.call('HSET', KEYS[2], name, count)
  elseif known then
    redis.call('HDEL', key, field)
    redis.call('HDEL', KEYS[2], name)
    if tonumber(is[5] or 0) > 0 then
      seen = math.max(seen, ARGV[4] == '0' and now or tonumber(ARGV[4]))
    end
    local others = redis.call('HLEN', key) - (is[1] and 4 or 0)
    if state == 'connected' then
      if others <= 0 then
        state = 'disconnected'
        if version > 0 then version, change = math.max(version + 1, now), 2 end
        if seen == 0 then seen = now end
      end
      redis.call('HSET', key, 'state', state, 'version', version, 'since', since, 'seen', seen)
      if others <= 0 and has_room() then
        note(tonumber(ARGV[3]), 1)
        redis.call('EXPIRE', key, ARGV[3])
      elseif others <= 0 then
        redis.call('EXPIRE', key, 60)
      end
    end
  end
  if change == 1 or change == 2 then
    record_due(KEYS[3], name, version, state, math.max(count, 0))
  end
  found[#found + 1] = {version, state == 'connected' and since or 0, change, missed}
end
for day, change in pairs(counts) do
  if change ~= 0 then redis.call('HINCRBY', KEYS[4], day, change) end
end
return {now, found}
