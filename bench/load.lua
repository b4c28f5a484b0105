-- The requests that wrk sends, the same for the product and for the bare route. After `--` on wrk's command line:
--   post BODYFILE        the same body each time; wrk then runs no Lua while it sends
--   keyed BODYFILE KEYS  each body once with every key in place of @KEY@
--   pull KEYS            GET of a random one of /pull/key-0 and so on
--   feed USERS           GET of a random one of /feeds/u1 and so on
--   posts USERS          posts by u1 and so on, in turn
-- Requests are made before the start, so that while it runs Lua only picks one. The result goes out as one line of JSON.

local requests, count, next_one = {}, 0, 0

local function read_file(name)
  local file = assert(io.open(name, "rb"))
  local text = file:read("*a")
  file:close()
  return text
end

local function in_turn()
  next_one = next_one % count + 1
  return requests[next_one]
end

local function at_random()
  return requests[math.random(count)]
end

function init(args)
  local mode = args[1]
  if mode == "post" or mode == "keyed" then
    wrk.method = "POST"
    wrk.headers["Content-Type"] = "application/json"
    wrk.body = read_file(args[2])
  end
  if mode == "keyed" then
    count = tonumber(args[3])
    for number = 1, count do
      requests[number] = wrk.format(nil, nil, nil, (wrk.body:gsub("@KEY@", string.format("key-%06d", number))))
    end
    request = in_turn
  elseif mode == "posts" then
    count = tonumber(args[2])
    wrk.method = "POST"
    wrk.headers["Content-Type"] = "application/json"
    for number = 1, count do
      local body = string.format('{"author_id":"u%d","content":"%s"}', number, string.rep("x", 60))
      requests[number] = wrk.format(nil, nil, nil, body)
    end
    request = in_turn
  elseif mode == "pull" or mode == "feed" then
    count = tonumber(args[2])
    for number = 1, count do
      local path = mode == "pull" and "/pull/key-" .. (number - 1) or "/feeds/u" .. number
      requests[number] = wrk.format(nil, path)
    end
    -- Threads are told apart by the address of a table of theirs.
    math.randomseed(tonumber(tostring(requests):match("0x(%x+)"), 16) % 2147483647)
    request = at_random
  end
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    'RESULT {"requests":%d,"microseconds":%d,"bytes":%d,"bad_status":%d,"connect":%d,"read":%d,"write":%d,"timeout":%d,'
      .. '"p50_us":%d,"p99_us":%d,"max_us":%d}\n',
    summary.requests, summary.duration, summary.bytes, errors.status, errors.connect, errors.read, errors.write,
    errors.timeout, latency:percentile(50), latency:percentile(99), latency.max))
end
