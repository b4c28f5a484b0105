//! Looks up the state of a partition before a batch handler decides where to read.

use std::{sync::Arc, time::Duration};

use rdkafka::{Offset, TopicPartitionList, consumer::Consumer, error::KafkaError};

use super::{Assignment, Failure, membership::Client};
use crate::{Broker, off_runtime};

/// Requests the group's commit and the ends of the log from Kafka. Cheap to clone.
#[derive(Clone)]
pub(super) struct Lookup {
    committed: Arc<dyn Fn(i32) -> Result<Option<i64>, KafkaError> + Send + Sync>,
    broker: Broker,
    topic: String,
}

impl Lookup {
    pub fn new(client: &Arc<Client>, broker: Broker, topic: &str) -> Self {
        let (client, wanted) = (Arc::downgrade(client), topic.to_owned());
        let committed = move |partition: i32| {
            let client = client.upgrade().ok_or(KafkaError::Canceled)?;
            let mut list = TopicPartitionList::new();
            list.add_partition(&wanted, partition);
            let found = client.committed_offsets(list, Duration::from_secs(5))?;
            Ok(found.elements().first().and_then(|element| match element.offset() {
                Offset::Offset(offset) => Some(offset),
                _ => None,
            }))
        };
        Self { committed: Arc::new(committed), broker, topic: topic.to_owned() }
    }

    pub async fn assignment(&self, partition: i32) -> Result<Assignment, Failure> {
        let retry = |error: KafkaError| Failure::Retry(format!("Kafka: {error}"));
        let (low, high) = self.broker.watermarks(&self.topic, partition).await.map_err(retry)?;
        let committed = self.committed.clone();
        let committed = off_runtime(move || committed(partition)).await.map_err(retry)?;
        Ok(Assignment { partition, committed, low, high })
    }
}
