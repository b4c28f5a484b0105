//! Tells Redis who is connected to this process, and that the process lives.
//!
//! Both are done by one loop, so that nothing is under way when markers are compared. A heartbeat costs one call for
//! the process and one for each bucket, however many are connected.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use metrics::counter;
use redis::RedisError;
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

use super::{
    Shared,
    announce::Change,
    keys::{BUCKETS, Bucket},
    script::{Speaker, Update},
};
use crate::platform::unknown::Unknown;

/// How long changes are gathered before they are told.
const GATHER: Duration = Duration::from_millis(20);
/// How soon a bucket is asked again that did not answer.
const AFTER_SILENCE: Duration = Duration::from_millis(300);
/// Receivers told in one round, and by one script: Redis does nothing else while it runs.
const ROUND: usize = 2_000;
const CHUNK: usize = 100;

/// Why nothing more can be told for now.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    #[error("Redis does not answer")]
    Absent,
    #[error(transparent)]
    Redis(#[from] RedisError),
    #[error("this process was taken over, or Redis has lost data")]
    Lost,
    #[error(transparent)]
    Unknown(#[from] Unknown),
}

/// The process as Redis knows it.
pub struct Register {
    /// Another one after every loss, so that what is left of the old one cannot be mistaken for it.
    process: String,
    buckets: [Marker; BUCKETS],
    /// What it was before, while not all is told anew.
    former: Option<String>,
    /// `None` until all markers were compared.
    next_beat: Option<Instant>,
}

#[derive(Clone, Copy, Default)]
struct Marker {
    written: u64,
    /// One more may have been written.
    uncertain: bool,
    /// The bucket's server did not answer; the others go on.
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

    /// Tells and beats; never ends by itself.
    pub async fn run(&mut self, shared: &Shared) {
        loop {
            let Err(trouble) = self.live(shared).await else { continue };
            tracing::debug!(error = %trouble, "presence is not told for the moment");
            self.next_beat = None;
            if matches!(trouble, Trouble::Lost) {
                self.begin_anew(shared);
            } else {
                tokio::time::sleep(Duration::from_millis(200 + fastrand::u64(0..200))).await;
            }
        }
    }

    async fn live(&mut self, shared: &Shared) -> Result<(), Trouble> {
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

    /// A new name, under which everything is told again. The old one is ended after that, so that nobody seems
    /// to have gone meanwhile.
    fn begin_anew(&mut self, shared: &Shared) {
        tracing::warn!("Redis has lost what it knew of this process's connections; telling it again");
        counter!("postrider_presence_restorations_total").increment(1);
        *self = Self { former: Some(std::mem::take(&mut self.process)), ..Self::default() };
        shared.local.forget_told();
    }

    /// Compares all markers and renews the lease. When the next one is due.
    pub async fn beat(&mut self, shared: &Shared) -> Result<Instant, Trouble> {
        let began = Instant::now();
        let process = &self.process;
        let looks = Bucket::all().zip(self.buckets).map(|(bucket, marker)| {
            let calls = shared.calls();
            async move {
                let expected = [marker.written, marker.written + u64::from(marker.uncertain)];
                let found = calls?.look(bucket, process, expected).await?;
                let known = found.parse().ok().filter(|number| expected.contains(number));
                known.ok_or(Trouble::Lost)
            }
        });
        let found = join_all(looks).await;
        // All were asked, so that each bucket that was lost has been marked.
        for (marker, found) in self.buckets.iter_mut().zip(found) {
            match found {
                Ok(written) => *marker = Marker { written, ..Marker::default() },
                Err(Trouble::Lost) => return Err(Trouble::Lost),
                Err(_) => marker.silent = true,
            }
        }
        // One shard that is away must not end what is on the others.
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

    /// Tells what has changed, up to a bound; whether anything was told.
    pub async fn tell(&mut self, shared: &Shared) -> Result<bool, Trouble> {
        let can = |receiver: &str| !self.buckets[Bucket::of(receiver).0].silent;
        let updates = shared.local.take(ROUND, Instant::now(), can);
        let mut parts: [Vec<Update<Arc<str>>>; BUCKETS] = Default::default();
        for update in updates {
            parts[Bucket::of(&update.receiver).0].push(update);
        }
        let process = &self.process;
        let told = self.buckets.iter_mut().zip(Bucket::all()).zip(parts);
        let told = told.map(|((marker, bucket), part)| tell_bucket(shared, process, bucket, marker, part));
        let mut any = false;
        for outcome in join_all(told).await {
            match outcome {
                Ok(told) => any |= told,
                Err(Trouble::Lost) => return Err(Trouble::Lost),
                // The markers are looked at before anything more is told.
                Err(_) => self.next_beat = None,
            }
        }
        Ok(any)
    }

    /// Leaves the register at the end of the process. Whether it was the last one, and nobody else will say
    /// that its receivers have gone.
    pub async fn leave(&mut self, shared: &Shared) -> Result<bool, Trouble> {
        self.beat(shared).await?;
        while self.tell(shared).await? {}
        let linger_ms = u64::try_from(shared.config.linger().as_millis()).unwrap_or(u64::MAX);
        Ok(shared.calls()?.retire(&self.process, linger_ms).await? == 0)
    }
}

async fn tell_bucket(
    shared: &Shared,
    process: &str,
    bucket: Bucket,
    marker: &mut Marker,
    updates: Vec<Update<Arc<str>>>,
) -> Result<bool, Trouble> {
    let mut rest = updates.as_slice();
    while !rest.is_empty() {
        let (chunk, more) = rest.split_at(rest.len().min(CHUNK));
        let told = tell_chunk(shared, process, bucket, marker, chunk).await;
        if let Err(trouble) = told {
            marker.silent = true;
            shared.local.put_back(rest.iter().cloned());
            return Err(trouble);
        }
        rest = more;
    }
    Ok(!updates.is_empty())
}

async fn tell_chunk(
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
    let changes = updates.iter().zip(&outcomes).filter_map(|(update, outcome)| {
        let connected = outcome.change?;
        let connections = update.connections.max(0);
        let receiver = update.receiver.clone();
        Some(Change { receiver, connected, connections, at_ms: now_ms, version: outcome.version })
    });
    shared.announcer.add(changes);
    Ok(())
}
