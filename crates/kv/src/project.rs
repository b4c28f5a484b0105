//! Projection of the key-value view: applies batches of `messages`, one partition at a time.
//!
//! Reading starts at the group's commit point. Records that the view already has are not written
//! again. Records that are applied by version are checked again, because the previous owner may
//! have crashed between writing the view and restating its newer value.

use std::sync::Arc;

use metrics::{counter, gauge};
use postrider_health::Check;
use postrider_kafka::{
    self as kafka, Broker, Producer,
    batch::{Batch, Record},
    consumer::{Assignment, BatchHandler, Failure, Poison},
};
use postrider_projection::ProjectionStatus;
use postrider_redis::Redis;
use postrider_time::clock;

use super::{
    Config, TOPIC,
    entry::Marker,
    keys::Keys,
    plan::{Plan, plan},
    record::{self, Unfit},
    restate::Restater,
    script::Scripts,
    view::{Partition, unreachable},
};

/// Age from which the marker of an up-to-date view is renewed, in seconds.
const RENEW_AFTER_S: i64 = 60;

/// The key-value capability in the processor role.
pub struct Projector {
    pub(super) redis: tokio::sync::watch::Receiver<Option<Redis>>,
    pub(super) restater: Restater,
    pub(super) scripts: Scripts,
    broker: Broker,
    topic: String,
    config: Config,
    key_prefix: String,
    status: ProjectionStatus,
}

impl Projector {
    pub fn new(
        config: Config,
        kafka: &kafka::Config,
        key_prefix: &str,
        redis: tokio::sync::watch::Receiver<Option<Redis>>,
        producer: Producer,
        broker: Broker,
        check: Check,
    ) -> Arc<Self> {
        Arc::new(Self {
            redis,
            restater: Restater::new(producer, kafka.topic(TOPIC)),
            broker,
            topic: kafka.topic(TOPIC),
            scripts: Scripts::default(),
            config,
            key_prefix: key_prefix.to_owned(),
            status: ProjectionStatus::new(check),
        })
    }

    pub(super) fn redis(&self) -> Result<Redis, Failure> {
        self.redis.borrow().clone().ok_or_else(|| Failure::Retry("Redis is not connected yet".to_owned()))
    }

    /// Reports a partition's progress in readiness and metrics.
    fn report(&self, partition: i32, problem: Option<String>, remaining: i64) {
        gauge!("postrider_kv_rebuild_remaining_records", "partition" => partition.to_string()).set(remaining as f64);
        self.status.report(partition, problem);
    }

    fn report_marker(&self, partition: &Partition) {
        match partition.marker.target {
            None => self.report(partition.number, None, 0),
            Some(target) => {
                let next = partition.marker.next;
                let text = format!("rebuilding the view, at offset {next} of {target}");
                self.report(partition.number, Some(text), target - next);
            }
        }
    }

    /// Compares and sets the marker. Fails with `Restart` if Redis has a different one.
    async fn mark(
        &self,
        partition: &mut Partition,
        expected: &str,
        marker: Marker,
        drop_view: bool,
    ) -> Result<(), Failure> {
        partition.mark(&self.scripts, &mut self.redis()?, expected, marker, drop_view).await?;
        self.report_marker(partition);
        Ok(())
    }

    async fn read_marker(&self, number: i32, keys: &Keys) -> Result<Option<Marker>, Failure> {
        let mut redis = self.redis()?;
        let found: Option<Vec<u8>> = redis::cmd("HGET")
            .arg(&keys.view)
            .arg(super::keys::MARKER_FIELD)
            .query_async(&mut redis)
            .await
            .map_err(unreachable)?;
        let marker = found.as_deref().map(Marker::decode).transpose();
        marker.map_err(|unknown| Failure::Retry(format!("partition {number} of the view cannot be read: {unknown}")))
    }
}

impl BatchHandler for Projector {
    type Partition = Partition;

    async fn assigned(&self, assignment: Assignment) -> Result<(Partition, i64), Failure> {
        let number = assignment.partition;
        let keys = Keys::new(&self.key_prefix, self.config.epoch, number);
        let found = match self.read_marker(number, &keys).await {
            Err(Failure::Retry(problem)) => {
                self.report(number, Some(problem.clone()), 0);
                return Err(Failure::Retry(problem));
            }
            found => found?,
        };
        let marker = found.unwrap_or(Marker { next: assignment.low, written_s: 0, target: None });
        let expected = found.map(|marker| marker.encode()).unwrap_or_default();
        let settled = assignment.committed.unwrap_or(0);
        let mut partition = Partition { number, partitions: self.config.partitions, keys, marker, settled };
        let from = match plan(found, &assignment, clock::now_ms() / 1_000) {
            Plan::Continue => assignment.committed.unwrap_or(assignment.low).clamp(assignment.low, marker.next),
            Plan::CatchUp { target } => {
                tracing::warn!(
                    partition = number,
                    next = marker.next,
                    target,
                    "view lost its latest writes, catching up"
                );
                // Keeps the age of the marker, because detecting the loss does not make the view
                // newer.
                let behind = Marker { target: Some(target), ..marker };
                self.mark(&mut partition, &expected, behind, false).await?;
                marker.next
            }
            Plan::Rebuild { from, target } => {
                if target > from {
                    counter!("postrider_kv_rebuilds_total").increment(1);
                    tracing::warn!(
                        partition = number,
                        from,
                        target,
                        "view is missing or stale, rebuilding it from the topic"
                    );
                }
                self.mark(&mut partition, &expected, Marker::new(from, Some(target)), true).await?;
                from
            }
            Plan::Refuse { applied } => {
                let high = assignment.high;
                let problem = format!(
                    "the topic ends at offset {high}, but offset {applied} was applied: the topic was replaced or truncated; raise `kv.epoch` to rebuild the view with a new consumer group"
                );
                self.report(number, Some(problem.clone()), 0);
                return Err(Failure::Retry(problem));
            }
        };
        self.report_marker(&partition);
        self.drop_older_epochs(number).await?;
        Ok((partition, from))
    }

    async fn apply(&self, partition: &mut Partition, batch: &Batch) -> Result<Vec<Poison>, Failure> {
        let Some(next) = batch.next_offset() else { return Ok(Vec::new()) };
        // Records that an earlier owner finished have been dead-lettered; those it only wrote may
        // not have been.
        let location = partition.location();
        let written = batch.iter().filter(|record| record.offset() < partition.marker.next);
        let unsettled = written.filter(|record| record.offset() >= partition.settled);
        let unfit = |record: Record<'_>| Some((record.offset(), record::judge(&location, &record).err()?));
        let mut unfit: Vec<(i64, Unfit)> = unsettled.filter_map(unfit).collect();
        if next > partition.marker.next {
            unfit.extend(self.write(partition, batch).await?);
        }
        self.restate_newer(partition, batch).await?;
        counter!("postrider_kv_projected_records_total").increment(batch.len() as u64);
        Ok(unfit.into_iter().map(|(offset, unfit)| self.dead_letter(partition, offset, unfit)).collect())
    }

    async fn caught_up(&self, partition: &mut Partition) -> Result<(), Failure> {
        if partition.marker.is_complete() {
            return Ok(());
        }
        let expected = partition.marker.encode();
        // The end of the log was reached; its last records may have been compacted away.
        let next = partition.marker.next.max(partition.marker.target.unwrap_or(0));
        let complete = Marker::new(next, None);
        self.mark(partition, &expected, complete, false).await?;
        tracing::info!(partition = partition.number, next = complete.next, "view is complete");
        Ok(())
    }

    async fn idle(&self, partition: &mut Partition) -> Result<(), Failure> {
        // Checks the marker, because there may be no writes for hours and Redis may lose its data
        // meanwhile.
        if self.read_marker(partition.number, &partition.keys).await? != Some(partition.marker) {
            return Err(Failure::Restart("the marker of the view has changed".to_owned()));
        }
        if !partition.marker.is_complete() {
            return Ok(());
        }
        self.renew_marker(partition).await?;
        self.expire(partition).await
    }

    fn revoked(&self, partition: i32) {
        gauge!("postrider_kv_rebuild_remaining_records", "partition" => partition.to_string()).set(0.0);
        self.status.revoked(partition);
    }

    fn joined(&self, gained: &[i32]) {
        self.status.joined(gained);
    }

    fn left(&self) {
        self.status.left();
    }
}

impl Projector {
    /// Writes the part of a batch that the view lacks.
    async fn write(&self, partition: &mut Partition, batch: &Batch) -> Result<Vec<(i64, Unfit)>, Failure> {
        let was_complete = partition.marker.is_complete();
        let unfit = partition.write(&self.scripts, &mut self.redis()?, batch, clock::now_ms()).await?;
        if !was_complete {
            self.report_marker(partition);
        }
        Ok(unfit)
    }

    /// Appends the entries that must be restated after a batch, and waits until Kafka has stored
    /// them.
    async fn restate_newer(&self, partition: &Partition, batch: &Batch) -> Result<(), Failure> {
        for restatement in partition.restatements(&mut self.redis()?, batch).await? {
            counter!("postrider_kv_restated_records_total").increment(1);
            let receipt = self.restater.send(partition.number, &restatement);
            self.restater.stored(receipt).await?;
        }
        Ok(())
    }

    /// Returns an invalid record as poison, which the consumer dead-letters.
    fn dead_letter(&self, partition: &Partition, offset: i64, unfit: Unfit) -> Poison {
        counter!("postrider_kv_poison_records_total", "reason" => unfit.reason.class).increment(1);
        if unfit.misplaced {
            self.misplaced(partition.number, offset);
        }
        Poison { offset, reason: unfit.reason }
    }

    /// Reports a push in the wrong partition, which means that partitions were added after it was
    /// written.
    fn misplaced(&self, partition: i32, offset: i64) {
        let problem = format!(
            "partition {partition} has a record at offset {offset} whose key belongs to another partition: partitions were added to the topic, and keys pushed before cannot be found; use a new topic and push the values again"
        );
        self.status.report_fault(problem);
    }

    /// Renews the marker of an up-to-date view, so that its age shows for how long the view was not
    /// maintained. After too long, tombstones may have been missed.
    async fn renew_marker(&self, partition: &mut Partition) -> Result<(), Failure> {
        let marker = partition.marker;
        if clock::now_ms() / 1_000 - marker.written_s < RENEW_AFTER_S {
            return Ok(());
        }
        match self.broker.watermarks(&self.topic, partition.number).await {
            Ok((_, high)) if high <= marker.next => {
                self.mark(partition, &marker.encode(), Marker::new(marker.next, None), false).await
            }
            _ => Ok(()),
        }
    }

    /// Deletes the views of earlier epochs.
    async fn drop_older_epochs(&self, partition: i32) -> Result<(), Failure> {
        let mut redis = self.redis()?;
        for epoch in 0..self.config.epoch {
            let old = Keys::new(&self.key_prefix, epoch, partition);
            redis::cmd("UNLINK")
                .arg(&old.view)
                .arg(&old.ends)
                .arg(&old.id_counts)
                .query_async::<()>(&mut redis)
                .await
                .map_err(unreachable)?;
        }
        Ok(())
    }
}
