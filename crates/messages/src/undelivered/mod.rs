//! Publishes an event for each message that was not delivered in time, so that consumers can send a
//! push notification.
//!
//! One process at a time owns this search. It goes through stored messages partition by partition
//! once they are old enough, and writes an event for each undelivered one: at least once, with the
//! same id every time. Its position advances only after Kafka has stored the events.

mod event;
mod round;
mod store;

use std::time::{Duration, Instant};

use metrics::{counter, gauge};
use postrider_kafka::{
    self as kafka, Outgoing, Producer, Receipt, SendError, Stored, TopicsReady, dead_letter, event as kafka_event,
};
use postrider_postgres::query;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::{
    round::{MARKS, Round},
    store::{Limits, Row, Store},
};
use super::{Config, EVENTS_TOPIC};

/// Time without a renewal after which another process takes over.
const LEASE: Duration = Duration::from_secs(6);
/// Interval between searches, and between checks of the ownership.
const EVERY: Duration = Duration::from_secs(1);
/// Interval at which new partitions get a position and old marks are deleted.
const UPKEEP: Duration = Duration::from_secs(30);
/// Maximum number and size of events in flight.
const LIMITS: Limits = Limits { rows: 500, bytes: 4 << 20 };
/// Upper bound of the delay: a hundred years, in milliseconds.
const MAX_DELAY_MS: u64 = 3_155_760_000_000;

/// Why a search step failed.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Postgres(#[from] query::Error),
    #[error("Kafka: {0}")]
    Kafka(#[from] SendError),
}

/// The search for undelivered messages.
pub struct Undelivered {
    store: Store,
    producer: Producer,
    topics_ready: TopicsReady,
    topic: String,
    /// 0 disables the search.
    delay_ms: i64,
    retention_days: u32,
    id: Uuid,
    /// Time of the last confirmed ownership; `None` if another process owns the search.
    owned: Option<Instant>,
    kept_up: Option<Instant>,
}

impl Undelivered {
    pub fn new(
        config: &Config,
        kafka: &kafka::Config,
        pool: PgPool,
        producer: Producer,
        topics_ready: TopicsReady,
    ) -> Self {
        Self {
            store: Store::new(pool),
            producer,
            topics_ready,
            topic: kafka.topic(EVENTS_TOPIC),
            delay_ms: config.undelivered_after_ms.min(MAX_DELAY_MS) as i64,
            retention_days: config.retention_days,
            id: kafka_event::new_id(),
            owned: None,
            kept_up: None,
        }
    }

    /// Runs until the stop.
    pub async fn run(mut self, stop: CancellationToken) {
        let work = async { if self.delay_ms == 0 { self.forget_forever().await } else { self.search_forever().await } };
        stop.run_until_cancelled(work).await;
        // Releases the ownership, so that another process need not wait for the lease to expire.
        if self.owned.is_some() && self.store.release(self.id).await.is_err() {
            tracing::debug!("releasing the search for undelivered messages failed, its lease will expire");
        }
    }

    async fn search_forever(&mut self) {
        let mut logged = false;
        loop {
            let began = Instant::now();
            let pause = match self.look().await {
                // While there is a backlog, half of the time is left to other work.
                Ok(true) => began.elapsed().max(Duration::from_millis(20)),
                Ok(false) => {
                    logged = false;
                    EVERY
                }
                Err(fault) => {
                    if !std::mem::replace(&mut logged, true) {
                        tracing::warn!(error = %fault, "search for undelivered messages failed, retrying");
                    }
                    EVERY
                }
            };
            tokio::time::sleep(pause.mul_f64(0.9 + fastrand::f64() * 0.2)).await;
        }
    }

    /// Runs while the search is disabled: discards positions and marks, so that enabling it later
    /// does not report old messages.
    async fn forget_forever(&self) {
        loop {
            let forgotten = match self.store.forget_places().await {
                Ok(()) => self.store.forget_all_marks().await,
                Err(error) => Err(error),
            };
            if let Err(error) = forgotten {
                tracing::debug!(error = %error, "deleting marks of messages failed, retrying");
            }
            tokio::time::sleep(UPKEEP).await;
        }
    }

    /// Runs one step. Returns true if there may be more to do at once.
    async fn look(&mut self) -> Result<bool, Fault> {
        if !self.own().await? {
            return Ok(false);
        }
        if self.kept_up.is_none_or(|at| at.elapsed() > UPKEEP) {
            self.store.forget_marks(self.retention_days).await?;
            self.store.begin().await?;
            self.kept_up = Some(Instant::now());
        }
        let waiting = self.store.waiting(MARKS).await?;
        let delay_us = self.delay_ms.saturating_mul(1_000);
        gauge!("postrider_messages_undelivered_behind_seconds").set(round::behind_seconds(&waiting, delay_us));
        let Some(round) = round::choose(&waiting, delay_us) else { return Ok(false) };
        self.go_through(&round).await?;
        Ok(true)
    }

    /// Claims or renews the ownership. A process that cannot write to Kafka leaves it to others.
    async fn own(&mut self) -> Result<bool, Fault> {
        let able = self.producer.is_up() && self.topics_ready.get();
        if able && self.owned.is_some_and(|at| at.elapsed() < EVERY) {
            return Ok(true);
        }
        let asked = Instant::now();
        let owner = able && self.store.claim(self.id, LEASE.as_millis() as i64).await?;
        if owner && self.owned.is_none() {
            tracing::info!(after.ms = self.delay_ms, "searching for undelivered messages");
            self.kept_up = None;
        }
        if !owner {
            gauge!("postrider_messages_undelivered_behind_seconds").set(0.0);
        }
        self.owned = owner.then_some(asked);
        gauge!("postrider_messages_undelivered_owner").set(f64::from(u8::from(owner)));
        Ok(owner)
    }

    /// Publishes events for one page of a round and advances the positions as far as Kafka has
    /// stored them.
    async fn go_through(&self, round: &Round) -> Result<(), Fault> {
        if round.skipped() > 0 {
            tracing::warn!(records = round.skipped(), "skipping messages past their retention");
        }
        let mut rows = self.store.page(round, LIMITS).await?;
        let listed_all = rows.len() < usize::try_from(LIMITS.rows).unwrap_or(usize::MAX);
        let found = rows.len();
        rows.retain(|row| row.value.is_some());
        let complete = listed_all && rows.len() == found;
        let (sent, outcome) = self.publish(&rows).await;
        counter!("postrider_messages_undelivered_total").increment(sent as u64);
        let last = rows.get(..sent).and_then(<[Row]>::last).map(|row| (row.partition_id(), row.offset));
        let moves = match last {
            _ if complete && outcome.is_ok() => round.moves(None),
            Some(last) => round.moves(Some(last)),
            None => Vec::new(),
        };
        self.store.advance(&moves).await?;
        Ok(outcome?)
    }

    /// Publishes events. Returns how many of the first ones Kafka has stored, and the error of the
    /// next.
    async fn publish(&self, rows: &[Row]) -> (usize, Result<(), SendError>) {
        let mut receipts = Vec::with_capacity(rows.len());
        for row in rows {
            let receipt = self.send(row, true);
            let refused = matches!(&receipt, Err(error) if !matches!(error, SendError::TooLarge { .. }));
            receipts.push(receipt);
            if refused {
                break;
            }
        }
        for (sent, (row, receipt)) in rows.iter().zip(receipts).enumerate() {
            let mut stored = self.stored(receipt).await;
            // An event may be too large within a batch, even alone, or because of its data: retries
            // alone, then without data.
            for with_data in [true, false] {
                if matches!(stored, Err(SendError::TooLarge { .. })) {
                    stored = self.stored(self.send(row, with_data)).await;
                }
            }
            if let Err(error) = stored {
                return (sent, Err(error));
            }
        }
        (rows.len(), Ok(()))
    }

    async fn stored(&self, receipt: Result<Receipt, SendError>) -> Result<Stored, SendError> {
        receipt?.stored(&self.topic).await
    }

    fn send(&self, row: &Row, with_data: bool) -> Result<Receipt, SendError> {
        let value = event::value(row, with_data);
        self.producer.send(Outgoing {
            topic: &self.topic,
            key: Some(row.receiver_id.as_bytes()),
            payload: Some(&value),
            headers: Some(event::headers(row)),
            extra_bytes: dead_letter::ROOM_BYTES as usize,
            ..Outgoing::default()
        })
    }
}
