//! Consuming in batches: records of a partition are handed over in order, a batch at a time, and
//! their offset is stored only after the effect. Partitions go on independently of each other.
//!
//! One thread polls; a task per partition works. What waits is bounded: one batch being worked on,
//! one waiting, one being filled, and the client's own prefetch. A partition that is full for
//! long is paused; a handler whose dependency is down is asked again until it is back.

mod callbacks;
mod poll;
mod worker;

use std::{future::Future, sync::Arc, time::Duration};

use rdkafka::error::KafkaError;
use tokio_util::sync::CancellationToken;

use super::{Broker, Config, batch::Batch};
use crate::platform::ops::Beat;

/// Why a handler could not finish.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A dependency is down: the same is tried again, after a pause.
    #[error("{0}")]
    Retry(String),
    /// The handler's idea of the partition is stale: it starts over with `assigned`.
    #[error("starting over: {0}")]
    Restart(String),
}

/// A partition as it is handed to a handler.
#[derive(Debug, Clone, Copy)]
pub struct Assignment {
    pub partition: i32,
    /// The group's committed offset.
    pub committed: Option<i64>,
    /// The first offset of the log.
    pub low: i64,
    /// The offset that the next record will get.
    pub high: i64,
}

/// What a room does with batches. Called for one partition from one task at a time.
pub trait BatchHandler: Send + Sync + 'static {
    /// The handler's state for one partition.
    type Partition: Send;

    /// A partition was gained, or its handler asked to start over. Returns the first offset to read.
    fn assigned(&self, assignment: Assignment) -> impl Future<Output = Result<(Self::Partition, i64), Failure>> + Send;

    /// Makes the effect of a batch. When it returns, the batch may be committed.
    fn apply(&self, state: &mut Self::Partition, batch: &Batch) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Everything that the log had was handed over.
    fn caught_up(&self, state: &mut Self::Partition) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Called every second while there is nothing to apply.
    fn idle(&self, state: &mut Self::Partition) -> impl Future<Output = Result<(), Failure>> + Send;

    /// The partition is lost; nothing more may be done for it.
    fn revoked(&self, partition: i32);

    /// The group has given this member its share, on top of what it had: these partitions are new.
    /// None where there are more members than partitions.
    fn joined(&self, gained: &[i32]);

    /// All partitions are lost, and what comes next is not known yet.
    fn left(&self);
}

/// What a consumer reads and how much at a time.
#[derive(Debug, Clone)]
pub struct Subscription {
    /// Names the client in logs and metrics.
    pub name: &'static str,
    pub topic: String,
    pub group: String,
    pub max_batch_records: usize,
    pub max_batch_bytes: usize,
}

/// How long a revoked partition's batch may take to finish.
const REVOKE_DEADLINE: Duration = Duration::from_secs(5);

/// Consumes until `stop`; then finishes what is in flight, commits, and leaves the group.
pub async fn run<H: BatchHandler>(
    config: &Config,
    broker: Broker,
    subscription: Subscription,
    handler: Arc<H>,
    beat: Beat,
    stop: CancellationToken,
) -> Result<(), KafkaError> {
    let consumer = poll::connect(config, &subscription, handler, broker)?;
    let (ended, end) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name(format!("consume-{}", subscription.name))
        .spawn(move || {
            let _ = ended.send(consumer.poll_until(&stop, &beat));
        })
        .map_err(|error| KafkaError::ClientCreation(error.to_string()))?;
    end.await.unwrap_or(Err(KafkaError::Canceled))
}
