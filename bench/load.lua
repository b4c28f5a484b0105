-- The requests that wrk sends to the product and to the bare route. Arguments after `--` on wrk's command line:
--   post BODYFILE        POST the same body each time; wrk then runs no Lua while it sends
--   keyed BODYFILE KEYS  POST the body with each of KEYS keys in place of @KEY@, in turn
--   pull KEYS            GET /pull/key-N, with N random from 0 to KEYS - 1
--   feed USERS           GET /feeds/uN, with N random from 1 to USERS
--   posts USERS          POST a post by each of u1 to uUSERS, in turn
-- The requests are built before the start, so Lua only picks one during the run. The result is one line of JSON.

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
    -- The address of a table differs between threads, so each thread has its own seed.
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
