//! Calls of the atomic Redis scripts of presence. Each works within one bucket or on the registry
//! of processes.

use postrider_redis::Redis;
use postrider_telemetry::unknown::Unknown;
use redis::{FromRedisValue, RedisError, Value};

use super::{
    announce::Change,
    keys::{Bucket, Keys},
    scripts::Scripts,
};

/// Marker that another process sets when it takes over.
pub const TAKEN: &str = "taken";
/// Prefix of processes that are to be taken over.
pub const LEAVING: &str = "leaving:";

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

    /// Reports the version of the oldest change that a process has yet to send, or 0 while it has
    /// yet to register receivers. The report expires with its lease.
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

/// Row of an update's answer: version, `since` in milliseconds, change, due event of a missed
/// change.
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
