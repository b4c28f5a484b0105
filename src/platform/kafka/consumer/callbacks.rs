//! What the client library calls on the polling thread: membership changes, statistics, errors.

use std::sync::{Arc, Mutex};

use rdkafka::{
    ClientContext, Statistics, TopicPartitionList,
    consumer::{BaseConsumer, Consumer, ConsumerContext, Rebalance},
    error::KafkaError,
};

use super::{
    BatchHandler,
    poll::{Lanes, finish, lock},
};
use crate::platform::kafka::stats;

/// Shared between the polling thread and the callbacks that run on it.
pub(super) struct Context<H: BatchHandler> {
    pub lanes: Arc<Mutex<Lanes>>,
    pub topic: String,
    pub handler: Arc<H>,
}

impl<H: BatchHandler> ClientContext for Context<H> {
    fn stats(&self, statistics: Statistics) {
        stats::record(&statistics);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(error = %error, reason, "the consumer reports a problem");
    }
}

impl<H: BatchHandler> ConsumerContext for Context<H> {
    fn pre_rebalance(&self, client: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Revoke(list) = rebalance {
            let partitions: Vec<i32> = list.elements().iter().map(|element| element.partition()).collect();
            tracing::info!(topic = self.topic, ?partitions, "partitions are taken away");
            finish(client, &self.lanes, Some(&partitions));
            if lock(&self.lanes).is_empty() {
                self.handler.left();
            }
        }
    }

    fn post_rebalance(&self, client: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Assign(list) = rebalance {
            let partitions: Vec<i32> = list.elements().iter().map(|element| element.partition()).collect();
            if !partitions.is_empty() {
                tracing::info!(topic = self.topic, ?partitions, "partitions are assigned");
            }
            if let Err(error) = client.pause(list) {
                tracing::debug!(error = %error, "cannot pause what was just assigned");
            }
            self.handler.joined(&partitions);
            lock(&self.lanes).gained.extend(partitions);
        }
    }

    fn commit_callback(&self, result: Result<(), KafkaError>, _: &TopicPartitionList) {
        if let Err(error) = result {
            tracing::debug!(error = %error, "a commit failed; it is tried again");
        }
    }
}
