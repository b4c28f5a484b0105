//! The Redis scripts of presence, which `script` calls.
//!
//! They use the clock of Redis. The **marker** counts the writes of a process to a bucket. If the
//! marker differs from the expected value, the process was taken over or Redis has lost data; then
//! the script changes nothing.

use redis::Script;

const NOW: &str = "
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
";

/// Records an event as due and returns it. With 10,000 due events only the last one of each
/// receiver is kept.
const RECORD_DUE: &str = "
local function record_due(key, name, version, state, connections)
  local due = string.format('%d %s %d %d ', version, state, now, connections) .. name
  local place = redis.call('HLEN', key) < 10000 and string.format('%d', version) or ''
  redis.call('HSET', key, place .. ' ' .. name, due)
  return due
end
";

/// Resets the bucket's creation time when its server was restarted: the server may have lost the
/// last changes, which a process that made none of them cannot detect by its marker. Skipped
/// without the right to run `INFO`.
const RENEW: &str = "
local info = redis.pcall('INFO', 'server')
local run = type(info) == 'string' and string.match(info, 'run_id:(%x+)') or ''
local last_run = redis.call('HGET', KEYS[1], 'run')
if last_run ~= run then
  redis.call('HSET', KEYS[1], 'run', run)
  if last_run then redis.call('HSET', KEYS[1], 'born', now) end
end
redis.call('HSETNX', KEYS[1], 'born', now)
";

/// Applies updates of a process.
///
/// - KEYS: head, own, due, gone, then one per receiver.
/// - ARGV: process; expected marker; seconds for which disconnected receivers are stored; time when
///   they were last connected, or 0 for now; age in ms below which the bucket may have lost data;
///   maximum number of stored disconnected receivers in the bucket, or 0 for unlimited; then for
///   each receiver: name, connections or -1 if it disconnected, and the version and time at which
///   this process knows it to be connected, or 0 and 0.
/// - Returns nothing if the marker differs. Otherwise now and, for each receiver: version; time
///   since which it is connected, or 0; a change: 1 or 2 if it has just become connected or
///   disconnected, 3 if its state is unknown; and the due event of a missed change, or nothing.
///
/// A missed change is one that Redis has, that this process may have made without receiving the
/// answer, and whose event is still due. It is returned so that the event is not left to Redis
/// alone, which may lose it.
///
/// While the bucket may have lost data, which is also until it was reconciled with the topic, a
/// receiver that this process knows nothing of becomes
/// connected with version 0 and without an event, because another process may know that its event
/// was sent. If the process knows a newer version than Redis, the process's version applies. A
/// receiver with an invalid state is left unchanged.
///
/// Each change is recorded as due under its version, or, with 10,000 due events, without a version,
/// so that only the last one of each receiver is kept. `gone` counts the stored disconnected
/// receivers by the day on which they expire. Above the limit a receiver is stored for a minute,
/// uncounted: presence stays correct, only the time of the last connection is lost.
const UPDATE: &str = include_str!("update.lua");

/// Compares the marker. KEYS: head, own. ARGV: process, two expected markers. Returns the marker,
/// and the creation time of the bucket if it was not reconciled with the topic since then, or 0.
/// If data was lost, it resets the creation time, so that for a while missing receivers count as
/// unknown.
const LOOK: &str = "
local marker = redis.call('HGET', KEYS[2], '') or '0'
if marker == ARGV[2] or marker == ARGV[3] then
  if marker ~= '0' then redis.call('HSETNX', KEYS[1], 'p:' .. ARGV[1], now) end
elseif marker ~= 'taken' then
  redis.call('HSET', KEYS[1], 'born', now)
end
local head = redis.call('HMGET', KEYS[1], 'born', 'reconciled')
return {marker, head[1] ~= head[2] and tonumber(head[1]) or 0}
";

/// Applies the last events of receivers in the topic to a bucket that may have lost data.
///
/// - KEYS: head, due, gone, then one per receiver.
/// - ARGV: creation time of the bucket for which this was decided; seconds for which disconnected
///   receivers are stored; then for each receiver: name, version and state of its last event.
/// - Returns nothing if the bucket was created or reconciled meanwhile. Otherwise the due events
///   of the changes that it made.
///
/// Where Redis has an older version than the topic, its state applies, since every process has
/// registered: with the version of the topic if the topic has the same state, and otherwise as a
/// change. A receiver with an invalid state is left unchanged.
const RECONCILE: &str = include_str!("reconcile.lua");

/// Marks a bucket as reconciled. KEYS: head. ARGV: creation time for which this was done.
const RECONCILED: &str = "
if redis.call('HGET', KEYS[1], 'born') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'reconciled', ARGV[1])
return 1
";

/// Renews a lease. KEYS: processes. ARGV: process, lease in ms. Returns 0 if the process is being
/// taken over.
const BEAT: &str = "
if redis.call('ZSCORE', KEYS[1], 'leaving:' .. ARGV[1]) then return 0 end
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
return 1
";

/// Marks a process as leaving. KEYS: processes. ARGV: process, ms until it may be taken over.
/// Returns the number of live processes.
const RETIRE: &str = "
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[1], now + ARGV[2], 'leaving:' .. ARGV[1])
local alive = 0
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], now, '+inf')) do
  if string.sub(name, 1, 8) ~= 'leaving:' then alive = alive + 1 end
end
return alive
";

/// Lists the registry. KEYS: processes. Returns now, then names and lease expiries.
const LIST: &str = "
local found = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
table.insert(found, 1, tostring(now))
return found
";

/// Claims a takeover. KEYS: processes. ARGV: process, observed lease expiry or nothing, ms of the
/// claim, 1 to claim before the linger is over. Returns 1 to the process that may take over. If
/// that process dies, the claim expires and another one continues.
const CLAIM: &str = "
if (redis.call('ZSCORE', KEYS[1], ARGV[1]) or '') ~= ARGV[2] then return 0 end
local leaving = 'leaving:' .. ARGV[1]
local at = redis.call('ZSCORE', KEYS[1], leaving)
if at and tonumber(at) > now and ARGV[4] ~= '1' then return 0 end
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[1], now + ARGV[3], leaving)
return 1
";

/// Prevents further writes of a process. KEYS: own. Returns 0 if the process has no entries.
const FENCE: &str = "
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], '', 'taken')
return 1
";

/// Removes a process from a bucket. KEYS: head, own. ARGV: process.
const FINISH: &str = "
redis.call('DEL', KEYS[2])
redis.call('HDEL', KEYS[1], 'p:' .. ARGV[1])
return 1
";

/// Removes due events that Kafka has stored. KEYS: due. ARGV: pairs of receiver and version.
const SETTLE: &str = "
for i = 1, #ARGV, 2 do
  local last = ' ' .. ARGV[i]
  local due = redis.call('HGET', KEYS[1], last)
  if due and string.match(due, '^%d+') == ARGV[i + 1] then redis.call('HDEL', KEYS[1], last) end
  redis.call('HDEL', KEYS[1], ARGV[i + 1] .. last)
end
return 1
";

/// Reads a receiver. KEYS: head, receiver. Returns now, creation time of the bucket or 0, and the
/// receiver's fields and values.
const ASK: &str = "
local found = redis.call('HGETALL', KEYS[2])
table.insert(found, 1, redis.call('HGET', KEYS[1], 'born') or '0')
table.insert(found, 1, tostring(now))
return found
";

/// The compiled scripts.
pub struct Scripts {
    pub update: Script,
    pub look: Script,
    pub beat: Script,
    pub retire: Script,
    pub list: Script,
    pub claim: Script,
    pub fence: Script,
    pub finish: Script,
    pub settle: Script,
    pub ask: Script,
    pub reconcile: Script,
    pub reconciled: Script,
}

impl Default for Scripts {
    fn default() -> Self {
        let with_time = |code: &str| Script::new(&format!("{NOW}{code}"));
        let renewed = |code: &str| with_time(&format!("{RENEW}{code}"));
        Self {
            update: renewed(&format!("{RECORD_DUE}{UPDATE}")),
            look: renewed(LOOK),
            beat: with_time(BEAT),
            retire: with_time(RETIRE),
            list: with_time(LIST),
            claim: with_time(CLAIM),
            fence: Script::new(FENCE),
            finish: Script::new(FINISH),
            settle: Script::new(SETTLE),
            ask: with_time(ASK),
            reconcile: with_time(&format!("{RECORD_DUE}{RECONCILE}")),
            reconciled: Script::new(RECONCILED),
        }
    }
}
