//! Registers the connections of this process in Redis and renews its lease.
//!
//! One loop does both, so that no write is in progress while markers are compared. A heartbeat
//! costs one call for the process and one per bucket, however many receivers are connected.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use metrics::counter;
use postrider_telemetry::unknown::Unknown;
use redis::RedisError;
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

use super::{
    Shared,
    keys::{BUCKETS, Bucket},
    script::{Speaker, Update},
};

/// Time for which changes are collected before they are written.
const GATHER: Duration = Duration::from_millis(20);
/// Pause before a bucket that did not answer is tried again.
const AFTER_SILENCE: Duration = Duration::from_millis(300);
/// Maximum number of receivers written per round, and per script. Redis does nothing else during a
/// script.
const ROUND: usize = 2_000;
const CHUNK: usize = 100;

/// Why writing must stop for now.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    #[error("Redis does not answer")]
    Absent,
    #[error(transparent)]
    Redis(#[from] RedisError),
    #[error("another process has taken over, or Redis has lost data")]
    Lost,
    #[error(transparent)]
    Unknown(#[from] Unknown),
}

/// Registration of this process in Redis.
pub struct Register {
    /// Changes after every loss, so that leftovers of the previous registration cannot be mistaken
    /// for it.
    process: String,
    buckets: [Marker; BUCKETS],
    /// Previous name, until everything is registered again.
    former: Option<String>,
    /// `None` until all markers have been compared.
    next_beat: Option<Instant>,
}

#[derive(Clone, Copy, Default)]
struct Marker {
    written: u64,
    /// True if one more write may have been applied.
    uncertain: bool,
    /// True if the bucket's server did not answer; the others continue.
    silent: bool,
}

impl Default for Register {
    fn default() -> Self {
        Self {
            process: Uuid::now_v7().simple().to_string(),
            buckets: [Marker::default(); BUCKETS],
            former: None,
            next_beat: None,
        }
    }
}

impl Register {
    pub fn process(&self) -> &str {
        &self.process
    }

    /// Writes changes and heartbeats; runs forever.
    pub async fn run(&mut self, shared: &Shared) {
        loop {
            let Err(trouble) = self.step(shared).await else { continue };
            tracing::debug!(error = %trouble, "writing presence failed, retrying");
            self.next_beat = None;
            if matches!(trouble, Trouble::Lost) {
                self.start_over(shared);
            } else {
                tokio::time::sleep(Duration::from_millis(200 + fastrand::u64(0..200))).await;
            }
        }
    }

    async fn step(&mut self, shared: &Shared) -> Result<(), Trouble> {
        let now = Instant::now();
        let beat = match self.next_beat.filter(|at| *at > now) {
            Some(at) => at,
            None => self.beat(shared).await?,
        };
        if self.tell(shared).await? || self.next_beat.is_none() {
            return Ok(());
        }
        if let Some(former) = self.former.take() {
            shared.calls()?.retire(&former, 0).await?;
        }
        let next = shared.local.next_gone().map_or(beat, |gone| gone.min(beat));
        tokio::select! {
            () = sleep_until(next) => {}
            () = shared.local.changed.notified() => tokio::time::sleep(GATHER).await,
        }
        Ok(())
    }

    /// Registers everything again under a new name. The old name is retired afterwards, so that no
    /// receiver seems disconnected meanwhile.
    fn start_over(&mut self, shared: &Shared) {
        tracing::warn!("redis lost the connections of this process, registering them again");
        counter!("postrider_presence_restorations_total").increment(1);
        *self = Self { former: Some(std::mem::take(&mut self.process)), ..Self::default() };
        shared.local.forget_told();
    }

    /// Compares all markers and renews the lease. Returns the time of the next heartbeat.
    pub async fn beat(&mut self, shared: &Shared) -> Result<Instant, Trouble> {
        let began = Instant::now();
        let process = &self.process;
        let looks = Bucket::all().zip(self.buckets).map(|(bucket, marker)| {
            let calls = shared.calls();
            async move {
                let expected = [marker.written, marker.written + u64::from(marker.uncertain)];
                let (found, doubtful_ms) = calls?.look(bucket, process, expected).await?;
                let known = found.parse().ok().filter(|number| expected.contains(number));
                Ok((known.ok_or(Trouble::Lost)?, (bucket, doubtful_ms)))
            }
        });
        let found = join_all(looks).await;
        let mut doubtful = Vec::new();
        // Asks every bucket, so that each one that lost data has been marked.
        for (marker, found) in self.buckets.iter_mut().zip(found) {
            match found {
                Ok((written, bucket)) => {
                    *marker = Marker { written, ..Marker::default() };
                    doubtful.extend(Some(bucket).filter(|(_, born_ms)| *born_ms > 0));
                }
                Err(Trouble::Lost) => return Err(Trouble::Lost),
                Err(_) => marker.silent = true,
            }
        }
        *shared.doubtful.lock() = doubtful;
        // Until everything is registered, the topic knows of receivers that Redis lacks.
        let is_registering = self.former.is_some() || self.buckets.iter().any(|marker| marker.silent);
        let oldest = if is_registering { Some(0) } else { shared.announcer.oldest_unsent() };
        shared.calls()?.report_unsent(process, oldest, shared.config.whole_lease_ms()).await?;
        // An unavailable shard must not end the registrations on the others.
        if !shared.calls()?.beat(&self.process, shared.config.whole_lease_ms()).await? {
            return Err(Trouble::Lost);
        }
        shared.local.retry_unsure();
        let silent = self.buckets.iter().any(|marker| marker.silent);
        let pause = if silent { AFTER_SILENCE } else { shared.config.heartbeat() };
        let next = began + pause.mul_f64(0.9 + fastrand::f64() * 0.1);
        self.next_beat = Some(next);
        Ok(next)
    }

    /// Writes pending changes, up to `ROUND`. Returns true if there were any.
    pub async fn tell(&mut self, shared: &Shared) -> Result<bool, Trouble> {
        let can = |receiver: &str| !self.buckets[Bucket::of(receiver).0].silent;
        let updates = shared.local.take(ROUND, Instant::now(), can);
        let mut parts: [Vec<Update<Arc<str>>>; BUCKETS] = Default::default();
        for update in updates {
            parts[Bucket::of(&update.receiver).0].push(update);
        }
        let process = &self.process;
        let written = self.buckets.iter_mut().zip(Bucket::all()).zip(parts);
        let written = written.map(|((marker, bucket), part)| write_bucket(shared, process, bucket, marker, part));
        let mut any = false;
        for outcome in join_all(written).await {
            match outcome {
                Ok(written) => any |= written,
                Err(Trouble::Lost) => return Err(Trouble::Lost),
                // Markers are compared before anything more is written.
                Err(_) => self.next_beat = None,
            }
        }
        Ok(any)
    }

    /// Leaves the registry at the end of the process. Returns true if no other process is left to
    /// end its connections.
    pub async fn leave(&mut self, shared: &Shared) -> Result<bool, Trouble> {
        self.beat(shared).await?;
        while self.tell(shared).await? {}
        let linger_ms = u64::try_from(shared.config.linger().as_millis()).unwrap_or(u64::MAX);
        Ok(shared.calls()?.retire(&self.process, linger_ms).await? == 0)
    }
}

async fn write_bucket(
    shared: &Shared,
    process: &str,
    bucket: Bucket,
    marker: &mut Marker,
    updates: Vec<Update<Arc<str>>>,
) -> Result<bool, Trouble> {
    let mut rest = updates.as_slice();
    while !rest.is_empty() {
        let (chunk, more) = rest.split_at(rest.len().min(CHUNK));
        let written = write_chunk(shared, process, bucket, marker, chunk).await;
        if let Err(trouble) = written {
            marker.silent = true;
            shared.local.put_back(rest.iter().cloned());
            return Err(trouble);
        }
        rest = more;
    }
    Ok(!updates.is_empty())
}

async fn write_chunk(
    shared: &Shared,
    process: &str,
    bucket: Bucket,
    marker: &mut Marker,
    updates: &[Update<Arc<str>>],
) -> Result<(), Trouble> {
    let mut calls = shared.calls()?;
    let text = marker.written.to_string();
    marker.uncertain = true;
    let remember_s = shared.config.remember_s();
    let doubt_ms = shared.config.whole_lease_ms();
    let max_remembered = shared.config.max_remembered_of_a_bucket();
    let speaker = Speaker { process, marker: &text, remember_s, seen_ms: 0, doubt_ms, max_remembered };
    let (now_ms, outcomes) = calls.update(bucket, speaker, updates).await?.ok_or(Trouble::Lost)?;
    *marker = Marker { written: marker.written + 1, ..Marker::default() };
    shared.local.confirm(updates, &outcomes);
    let changes = updates.iter().zip(outcomes);
    shared
        .announcer
        .add(changes.flat_map(|(update, outcome)| outcome.changes(&update.receiver, update.connections, now_ms)));
    Ok(())
}
