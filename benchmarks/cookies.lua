-- Requests of many visitors, for wrk: a cookie of KEYS each, in turn; DELAY ms between two of a
-- connection, on average: visitors do not wait for each other, so their pauses are exponential.
-- A connection each, as with the configuration that `sessionproxy` prints for nginx: those that
-- are kept may all have been taken by the same of two asynchronous workers.
local keys, number = {}, 0
for line in io.lines(os.getenv("KEYS")) do keys[#keys + 1] = line end

function request()
  number = number + 1
  wrk.headers["Connection"] = "close"
  wrk.headers["Cookie"] = "sessionid=" .. keys[number % #keys + 1]
  return wrk.format("GET")
end

local pause = tonumber(os.getenv("DELAY") or "0")
if pause > 0 then
  math.randomseed(1)
  function delay() return math.floor(0.5 - pause * math.log(1 - math.random())) end
end

function done(summary, latency)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format("RESULT %d %d %d %d\n",
    summary.requests, summary.duration, latency:percentile(99), failed))
end
