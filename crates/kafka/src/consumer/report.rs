//! Reports the span of each partition of a consumer and the record that holds it, as metrics, in
//! the log, and for `/consumers` on the management port.

use std::collections::BTreeMap;

use metrics::gauge;
use postrider_health::Published;
use serde::Serialize;

use super::{Subscription, work::PartitionSpan};

/// Time after which a record that holds a commit point is logged, in seconds.
const LOG_HELD_AFTER_S: f64 = 30.0;

pub(super) struct Report {
    name: &'static str,
    topic: String,
    group: String,
    published: Published,
    /// By partition: the holder that was logged last.
    logged: BTreeMap<i32, i64>,
}

/// One consumer, as shown by `/consumers`.
#[derive(Serialize)]
struct Shown<'a> {
    consumer: &'a str,
    topic: &'a str,
    group: &'a str,
    partitions: Vec<ShownPartition>,
}

#[derive(Serialize)]
struct ShownPartition {
    partition: i32,
    /// Offset below which all records are finished; null before the first.
    commit_point: Option<i64>,
    paused: bool,
    #[serde(flatten)]
    span: PartitionSpan,
}

impl Report {
    pub fn new(subscription: &Subscription, published: Published) -> Self {
        let Subscription { name, topic, group, .. } = subscription.clone();
        Self { name, topic, group, published, logged: BTreeMap::new() }
    }

    /// Reports all owned partitions, each as `(partition, commit point, paused, span)`.
    pub fn update(&mut self, partitions: impl Iterator<Item = (i32, i64, bool, PartitionSpan)>) {
        let (mut records, mut bytes, mut oldest_s) = (0, 0, 0_f64);
        let mut shown = Vec::new();
        for (partition, stored, paused, span) in partitions {
            records += span.records;
            bytes += span.bytes;
            let held_s = span.holder.as_ref().map_or(0.0, |holder| holder.held_for.as_secs_f64());
            oldest_s = oldest_s.max(held_s);
            if held_s >= LOG_HELD_AFTER_S {
                self.log_holder(partition, &span, "record holds the commit point of its partition");
            }
            let commit_point = (stored >= 0).then_some(stored);
            shown.push(ShownPartition { partition, commit_point, paused, span });
        }
        gauge!("postrider_consumer_span_records", "consumer" => self.name).set(records as f64);
        gauge!("postrider_consumer_span_bytes", "consumer" => self.name).set(bytes as f64);
        gauge!("postrider_consumer_held_seconds", "consumer" => self.name).set(oldest_s);
        let shown = Shown { consumer: self.name, topic: &self.topic, group: &self.group, partitions: shown };
        self.published.set(serde_json::to_value(shown).unwrap_or_default());
    }

    /// Logs that a partition takes no more records for now.
    pub fn full(&mut self, partition: i32, span: &PartitionSpan) {
        if span.holder.as_ref().is_some_and(|holder| holder.held_for.as_secs_f64() >= 1.0) {
            self.log_holder(partition, span, "partition paused: the span past its commit point is full");
        }
    }

    fn log_holder(&mut self, partition: i32, span: &PartitionSpan, what: &str) {
        let Some(holder) = &span.holder else { return };
        if self.logged.insert(partition, holder.offset) == Some(holder.offset) {
            return;
        }
        tracing::warn!(
            consumer = self.name,
            topic = self.topic,
            partition,
            span.records = span.records,
            holder.offset = holder.offset,
            holder.key = holder.key.as_deref().unwrap_or("none"),
            holder.s = holder.held_for.as_secs(),
            holder.attempts = holder.attempts,
            holder.error = holder.error,
            "{what}"
        );
    }
}
