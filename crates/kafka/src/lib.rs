//! Kafka clients shared by all capabilities: producers with admission control, consumers that
//! commit an offset only after the record's effect is stored, and the creation and checking of
//! postrider's own topics. Also here: the probe that detects whether Kafka answers, dead letters,
//! the lag of groups, and scans of topics.

mod adaptive_linger;
pub mod admission;
pub mod batch;
pub mod broker;
mod callers;
mod client_watchdog;
pub mod committed;
mod config;
pub mod consumer;
pub mod dead_letter;
mod delivery;
pub mod event;
pub mod lag;
mod library_log;
mod outgoing;
mod partitioner;
mod pending;
mod position;
pub mod producer;
pub mod reach;
mod record_size;
pub mod replication;
pub mod scan;
mod stats;
pub mod tail;
mod topic_limits;
pub mod topics;
mod trial;

pub use broker::Broker;
pub use callers::CallersProducer;
pub use config::{Config, GroupProtocol, SecurityProtocol};
pub use dead_letter::DeadLetters;
pub use outgoing::{Outgoing, Receipt, SendError, Stored};
pub use partitioner::partition_of;
pub use position::{PartitionId, Position};
pub use producer::Producer;
pub use record_size::batch_bytes;
pub use topic_limits::TopicLimits;
pub use topics::{Admin, TopicError, TopicSpec, TopicsReady};
pub use trial::try_out;

use rdkafka::error::KafkaError;

/// Runs a blocking call of the client library on the blocking thread pool.
async fn off_runtime<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, KafkaError> + Send + 'static,
) -> Result<T, KafkaError> {
    match tokio::task::spawn_blocking(call).await {
        Ok(result) => result,
        Err(_) => Err(KafkaError::Canceled),
    }
}

/// Drops a client on its own thread, because the client library may wait for brokers that do not
/// answer.
fn discard<T: Send + 'static>(client: T) {
    // If the thread cannot be spawned, the client is dropped here, which may block.
    drop(std::thread::Builder::new().name("kafka-discard".to_owned()).spawn(move || drop(client)));
}
