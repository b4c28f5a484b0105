//! Atomic Redis scripts of presence. Each works within one bucket or on the registry of processes.
//!
//! They use the clock of Redis. The **marker** counts the writes of a process to a bucket. If the
//! marker differs from the expected value, the process was taken over or Redis has lost data; then
//! the script changes nothing.

use postrider_redis::Redis;
use postrider_telemetry::unknown::Unknown;
use redis::{FromRedisValue, RedisError, Script, Value};

use super::{
    announce::Change,
    keys::{Bucket, Keys},
};

/// Marker that another process sets when it takes over.
pub const TAKEN: &str = "taken";
/// Prefix of processes that are to be taken over.
pub const LEAVING: &str = "leaving:";

const NOW: &str = "
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
";

/// Records an event as due and returns it. With 10,000 due events only the last one of each receiver is kept.
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
    update: Script,
    look: Script,
    beat: Script,
    retire: Script,
    list: Script,
    claim: Script,
    fence: Script,
    finish: Script,
    settle: Script,
    ask: Script,
    reconcile: Script,
    reconciled: Script,
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

/// The connected state of a receiver, as known to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    pub version: i64,
    /// Milliseconds since the Unix epoch, by the clock of Redis.
    pub since_ms: i64,
}

/// An update of a receiver by a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Update<R> {
    pub receiver: R,
    /// -1 if it has disconnected.
    pub connections: i64,
    pub known: Option<Known>,
}

/// The process that sends updates, and their parameters.
#[derive(Debug, Clone, Copy)]
pub struct Speaker<'a> {
    pub process: &'a str,
    pub marker: &'a str,
    pub remember_s: u64,
    /// Time when disconnected receivers were last connected; 0 means now.
    pub seen_ms: i64,
    /// Age in ms from which a bucket is considered complete.
    pub doubt_ms: u64,
    /// Maximum number of stored disconnected receivers in a bucket; 0 means unlimited.
    pub max_remembered: u64,
}

/// Result of an update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    pub version: i64,
    /// State while connected, unless another process may know a newer one.
    pub known: Option<Known>,
    /// `true` if the receiver has just become connected, `false` if it has just become
    /// disconnected.
    pub change: Option<bool>,
    /// An earlier change whose answer this process may have missed, and whose event is due.
    pub missed: Option<Change>,
}

/// A process in the registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    pub process: String,
    pub leaving: bool,
    /// Expiry as Redis formats it, in milliseconds.
    pub ends: String,
}

/// Calls of the scripts over one connection.
pub struct Calls<'a> {
    pub scripts: &'a Scripts,
    pub keys: &'a Keys,
    pub redis: Redis,
}

impl Calls<'_> {
    /// Returns `None` if the marker differs, otherwise the time and one outcome per update.
    pub async fn update<R: AsRef<str>>(
        &mut self,
        bucket: Bucket,
        speaker: Speaker<'_>,
        updates: &[Update<R>],
    ) -> Result<Option<(i64, Vec<Outcome>)>, RedisError> {
        let mut call = self.scripts.update.key(self.keys.head(bucket));
        call.key(self.keys.own(bucket, speaker.process)).key(self.keys.due(bucket)).key(self.keys.gone(bucket));
        call.arg(speaker.process).arg(speaker.marker);
        call.arg(speaker.remember_s).arg(speaker.seen_ms).arg(speaker.doubt_ms).arg(speaker.max_remembered);
        for update in updates {
            let name = update.receiver.as_ref();
            let known = update.known.unwrap_or(Known { version: 0, since_ms: 0 });
            call.key(self.keys.receiver(bucket, name));
            call.arg(name).arg(update.connections).arg(known.version).arg(known.since_ms);
        }
        let found: Option<(i64, Vec<Row>)> = call.invoke_async(&mut self.redis).await?;
        Ok(found.map(|(now, rows)| (now, rows.into_iter().map(outcome).collect())))
    }

    /// Returns the marker of a process, which should be one of two expected ones, and the creation
    /// time of the bucket if it is to be reconciled with the topic, or 0.
    pub async fn look(
        &mut self,
        bucket: Bucket,
        process: &str,
        expected: [u64; 2],
    ) -> Result<(String, i64), RedisError> {
        let mut call = self.scripts.look.key(self.keys.head(bucket));
        call.key(self.keys.own(bucket, process)).arg(process).arg(&expected[..]);
        call.invoke_async(&mut self.redis).await
    }

    /// Renews the lease. Returns false if the process is being taken over.
    pub async fn beat(&mut self, process: &str, lease_ms: u64) -> Result<bool, RedisError> {
        let mut call = self.scripts.beat.key(self.keys.processes());
        call.arg(process).arg(lease_ms).invoke_async(&mut self.redis).await
    }

    /// Marks a process as leaving. Returns the number of other live processes.
    pub async fn retire(&mut self, process: &str, delay_ms: u64) -> Result<u64, RedisError> {
        let mut call = self.scripts.retire.key(self.keys.processes());
        call.arg(process).arg(delay_ms).invoke_async(&mut self.redis).await
    }

    /// Returns the time and all processes.
    pub async fn list(&mut self) -> Result<(i64, Vec<Lease>), RedisError> {
        let call = self.scripts.list.key(self.keys.processes());
        let found: Vec<String> = call.invoke_async(&mut self.redis).await?;
        let Some((now, rest)) = found.split_first() else { return Ok((0, Vec::new())) };
        let leases = rest.chunks_exact(2).map(|pair| {
            let name = pair[0].strip_prefix(LEAVING);
            Lease { process: name.unwrap_or(&pair[0]).to_owned(), leaving: name.is_some(), ends: pair[1].clone() }
        });
        Ok((now.parse().unwrap_or(0), leases.collect()))
    }

    pub async fn claim(&mut self, process: &str, seen: &str, ms: u64, at_once: bool) -> Result<bool, RedisError> {
        let mut call = self.scripts.claim.key(self.keys.processes());
        call.arg(process).arg(seen).arg(ms).arg(u8::from(at_once)).invoke_async(&mut self.redis).await
    }

    /// Removes a process from the registry after its takeover.
    pub async fn forget(&mut self, process: &str) -> Result<(), RedisError> {
        let mut call = redis::cmd("ZREM");
        call.arg(self.keys.processes()).arg(format!("{LEAVING}{process}")).query_async(&mut self.redis).await
    }

    pub async fn fence(&mut self, bucket: Bucket, process: &str) -> Result<bool, RedisError> {
        self.scripts.fence.key(self.keys.own(bucket, process)).invoke_async(&mut self.redis).await
    }

    pub async fn finish(&mut self, bucket: Bucket, process: &str) -> Result<(), RedisError> {
        let mut call = self.scripts.finish.key(self.keys.head(bucket));
        call.key(self.keys.own(bucket, process)).arg(process).invoke_async(&mut self.redis).await
    }

    pub async fn settle(&mut self, bucket: Bucket, done: &[(&str, i64)]) -> Result<(), RedisError> {
        let mut call = self.scripts.settle.key(self.keys.due(bucket));
        for (receiver, version) in done {
            call.arg(*receiver).arg(*version);
        }
        call.invoke_async(&mut self.redis).await
    }

    /// Returns the time, the creation time of the bucket (0 if none), and a receiver's fields.
    pub async fn ask(
        &mut self,
        bucket: Bucket,
        receiver: &str,
    ) -> Result<(i64, i64, Vec<(String, String)>), RedisError> {
        let mut call = self.scripts.ask.key(self.keys.head(bucket));
        let found: Vec<String> = call.key(self.keys.receiver(bucket, receiver)).invoke_async(&mut self.redis).await?;
        let number = |at: usize| found.get(at).and_then(|text| text.parse().ok()).unwrap_or(0);
        let fields = found.get(2..).unwrap_or_default().chunks_exact(2);
        Ok((number(0), number(1), fields.map(|pair| (pair[0].clone(), pair[1].clone())).collect()))
    }

    /// Applies the last events of receivers to a bucket that was created at this time. Returns the
    /// changes that it made, or `None` if the bucket was created or reconciled meanwhile.
    pub async fn reconcile(
        &mut self,
        bucket: Bucket,
        born_ms: i64,
        remember_s: u64,
        last: &[Change],
    ) -> Result<Option<Vec<Change>>, RedisError> {
        let mut call = self.scripts.reconcile.key(self.keys.head(bucket));
        call.key(self.keys.due(bucket)).key(self.keys.gone(bucket)).arg(born_ms).arg(remember_s);
        for change in last {
            call.key(self.keys.receiver(bucket, &change.receiver));
            call.arg(&*change.receiver).arg(change.version).arg(change.state());
        }
        let made: Option<Vec<String>> = call.invoke_async(&mut self.redis).await?;
        // An event that cannot be read stays due, for a version that can.
        Ok(made.map(|made| made.iter().filter_map(|due| Change::parse(due).ok()).collect()))
    }

    pub async fn mark_reconciled(&mut self, bucket: Bucket, born_ms: i64) -> Result<(), RedisError> {
        self.scripts.reconciled.key(self.keys.head(bucket)).arg(born_ms).invoke_async(&mut self.redis).await
    }

    /// Reports the version of the oldest change that a process has yet to send, or 0 while it has yet
    /// to register receivers. The report expires with its lease.
    pub async fn report_unsent(&mut self, process: &str, oldest: Option<i64>, lease_ms: u64) -> Result<(), RedisError> {
        let (key, lease_ms) = (self.keys.unsent(process), lease_ms.to_string());
        match oldest {
            Some(version) => self.run(&["SET", &key, &version.to_string(), "PX", &lease_ms]).await,
            None => self.run(&["DEL", &key]).await,
        }
    }

    /// Returns the lowest version that any of these processes has reported.
    pub async fn oldest_unsent(&mut self, processes: impl Iterator<Item = &str>) -> Result<Option<i64>, RedisError> {
        let reads = processes.map(|process| redis::Cmd::get(self.keys.unsent(process))).collect();
        let mut oldest = None;
        for answer in self.redis.ask(reads).await {
            let version: Option<i64> = redis::from_redis_value(answer?)?;
            oldest = oldest.into_iter().chain(version).min();
        }
        Ok(oldest)
    }

    /// Runs one command.
    pub async fn run<T: FromRedisValue>(&mut self, words: &[&str]) -> Result<T, RedisError> {
        let mut command = redis::Cmd::new();
        for word in words {
            command.arg(*word);
        }
        let value: Value = command.query_async(&mut self.redis).await?;
        Ok(redis::from_redis_value(value)?)
    }
}

/// Row of an update's answer: version, `since` in milliseconds, change, due event of a missed change.
type Row = (i64, i64, i64, String);

fn outcome((version, since_ms, change, due): Row) -> Outcome {
    let known = (version > 0 && since_ms > 0).then_some(Known { version, since_ms });
    let change = match change {
        0 => None,
        1 => Some(true),
        2 => Some(false),
        // Nothing was changed; the next heartbeat retries the update.
        other => {
            Unknown::new("change of a receiver", other);
            None
        }
    };
    // An event that cannot be read stays due, for a version that can.
    let missed = if due.is_empty() { None } else { Change::parse(&due).ok() };
    Outcome { version, known, change, missed }
}
