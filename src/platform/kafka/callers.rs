//! The producers of callers' records, apart from that of our own topics.
//!
//! For one record that the broker refuses, the client library fails its whole batch and then drains every partition. So
//! callers' records have clients of their own. Records of a refused batch are sent again, each alone, through a client
//! whose batches have one record; so are all records of topics that take only small batches.

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
    topics::TopicLimits,
};

/// Cheap to clone; all clones share the clients.
#[derive(Clone)]
pub struct CallersProducer {
    together: Producer,
    alone: Producer,
    /// Cancelled when the task that sends records again has ended.
    resending_died: CancellationToken,
}

impl CallersProducer {
    /// Connects in the background, as [`Producer::start`] does.
    pub fn start(config: &Config, broker: &Broker) -> Result<Self, KafkaError> {
        let (resend, mut refused) = mpsc::unbounded_channel();
        let together = Producer::start_for(Purpose::Callers, config, broker.clone(), None, Some(resend))?;
        let admission = Some(together.admission());
        let alone = Producer::start_for(Purpose::Alone, config, broker.clone(), admission, None)?;
        let taker = alone.clone();
        let resending_died = CancellationToken::new();
        let guard = resending_died.clone().drop_guard();
        tokio::spawn(async move {
            let _guard = guard;
            while let Some(waiting) = refused.recv().await {
                taker.take_over(waiting);
            }
        });
        Ok(Self { together, alone, resending_died })
    }

    /// Returns what is cancelled when a part of them has ended, each with its name.
    pub fn died(&self) -> [(&'static str, CancellationToken); 3] {
        [
            ("callers' producer", self.together.died()),
            ("producer of single records", self.alone.died()),
            ("resending of refused records", self.resending_died.clone()),
        ]
    }

    /// Takes a record, or refuses it; never waits. The limits are those of its topic.
    pub fn send(&self, record: Outgoing<'_>, limits: &TopicLimits) -> Result<Receipt, SendError> {
        if limits.max_message_bytes < BATCH_BYTES { self.alone.send(record) } else { self.together.send(record) }
    }

    /// Returns the producer whose batches have one record.
    pub fn alone(&self) -> Producer {
        self.alone.clone()
    }

    /// Returns whether a record of this size would be taken now, as far as the bound is concerned.
    pub fn has_room(&self, bytes: usize) -> bool {
        self.together.has_room(bytes)
    }

    /// Waits for everything in flight, then stops. Call it off the runtime, after intake ended.
    pub fn close(&self, deadline: Duration) {
        let until = Instant::now() + deadline;
        self.together.close(deadline);
        self.alone.close(until.saturating_duration_since(Instant::now()));
    }
}
