//! Producers of callers' records, separate from the producer of postrider's own topics.
//!
//! When the broker rejects one record, the client library fails its whole batch and then drains
//! every partition. Callers' records therefore have their own clients. Records of a rejected batch
//! are sent again one by one, through a client whose batches have one record; so are all records of
//! topics that allow only small batches.

use std::time::{Duration, Instant};

use rdkafka::error::KafkaError;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{
    Config,
    broker::Broker,
    config::BATCH_BYTES,
    outgoing::{Outgoing, Purpose, Receipt, SendError},
    producer::Producer,
    topic_limits::TopicLimits,
};

/// Producers of callers' records. Cheap to clone; all clones share the clients.
#[derive(Clone)]
pub struct CallersProducer {
    together: Producer,
    alone: Producer,
    /// Cancelled when the task that resends records has ended.
    resending_died: CancellationToken,
}

impl CallersProducer {
    /// Starts the producers, which connect in the background as in [`Producer::start`].
    pub fn start(config: &Config, broker: &Broker) -> Result<Self, KafkaError> {
        let (resend, mut refused) = mpsc::unbounded_channel();
        let together = Producer::start_for(Purpose::Callers, config, broker.clone(), None, Some(resend))?;
        let admission = Some(together.admission());
        let alone = Producer::start_for(Purpose::Alone, config, broker.clone(), admission, None)?;
        let single_record_producer = alone.clone();
        let resending_died = CancellationToken::new();
        let guard = resending_died.clone().drop_guard();
        tokio::spawn(async move {
            let _guard = guard;
            while let Some(waiting) = refused.recv().await {
                single_record_producer.take_over(waiting);
            }
        });
        Ok(Self { together, alone, resending_died })
    }

    /// Returns a token for each part, with its name, that is cancelled when the part has ended.
    pub fn died(&self) -> [(&'static str, CancellationToken); 3] {
        [
            ("callers' producer", self.together.died()),
            ("producer of single records", self.alone.died()),
            ("resending of refused records", self.resending_died.clone()),
        ]
    }

    /// Accepts a record or rejects it; never waits. `limits` are those of the record's topic.
    pub fn send(&self, record: Outgoing<'_>, limits: &TopicLimits) -> Result<Receipt, SendError> {
        if limits.max_message_bytes < BATCH_BYTES { self.alone.send(record) } else { self.together.send(record) }
    }

    /// Returns the producer whose batches have one record each.
    pub fn alone(&self) -> Producer {
        self.alone.clone()
    }

    /// Returns whether the limit on what is in flight would admit a record of this size now.
    pub fn has_room(&self, bytes: usize) -> bool {
        self.together.has_room(bytes)
    }

    /// Waits up to `deadline` for everything in flight, then stops. Must be called off the runtime,
    /// after intake has ended.
    pub fn close(&self, deadline: Duration) {
        let until = Instant::now() + deadline;
        self.together.close(deadline);
        self.alone.close(until.saturating_duration_since(Instant::now()));
    }
}
