//! The projection: applies batches of the topic to feeds, one partition at a time, and then adds
//! posts to the timelines that exist. Records that are read again after a crash only update
//! timelines, because the crash may have happened between the two.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use metrics::counter;
use postrider_kafka::{PartitionId, batch::Record, consumer::Failure, dead_letter::Reason};
use postrider_postgres::query::Error;
use postrider_projection::{Partition, Progress, Project, Projection};
use sqlx::PgPool;
use tokio::sync::Notify;

use super::{
    Config,
    fan_out::{Applied, Authors, FanOut, Fanned, Overlap, overlaps},
    record::{self, Change, Event},
    timeline::Owner,
    timeline::TimelineWriter,
};

/// Approximate number of rows that one transaction inserts, so that other transactions do not wait
/// long and a failure costs little.
const RUN_ROWS: usize = 20_000;

/// Minimum time per batch of a partition. A batch that finishes earlier waits, so that the next one
/// is larger: each costs eight round trips, however small it is.
const PACE: Duration = Duration::from_millis(15);

/// The part of the feed capability that the processor role runs.
pub struct Projector {
    fan_out: FanOut,
    progress: Progress,
    timelines: Arc<TimelineWriter>,
    epoch: u32,
    /// Signalled when jobs were added.
    jobs: Arc<Notify>,
}

impl Projector {
    pub fn new(config: Config, pool: PgPool, timelines: Arc<TimelineWriter>, jobs: Arc<Notify>) -> Arc<Self> {
        let epoch = config.epoch;
        let fan_out = FanOut::new(pool, config);
        Arc::new(Self { progress: fan_out.progress(epoch), fan_out, timelines, epoch, jobs })
    }

    fn partition_id(&self, partition: i32) -> PartitionId {
        PartitionId { epoch: self.epoch, partition }
    }

    /// Returns the number of these events that go into one transaction.
    fn run(&self, events: &[Event], authors: &Authors) -> usize {
        let mut rows = 0;
        let fits = |event: &&Event| {
            rows += self.fan_out.weight(event, authors);
            rows <= RUN_ROWS
        };
        events.iter().take_while(fits).count().max(1).min(events.len())
    }

    /// Applies events and moves the progress. The inner error is that of an event that Postgres
    /// rejects.
    async fn apply(
        &self,
        projection: &Projection<Self>,
        partition: &mut Partition,
        events: &[Event],
        next: i64,
        authors: &Authors,
    ) -> Result<Result<(), Error>, Failure> {
        let (partition_id, span) = (self.partition_id(partition.number), (partition.next, next));
        let mut applied = self.fan_out.apply(partition_id, span, events, authors, Overlap::None).await;
        if applied.as_ref().is_err_and(overlaps) {
            applied = self.fan_out.apply(partition_id, span, events, authors, Overlap::Some).await;
        }
        let fanned = match applied {
            Ok(Applied::Done { fanned, jobs }) => {
                projection.advance(partition, next, true).await?;
                if jobs {
                    self.jobs.notify_one();
                }
                fanned
            }
            Ok(Applied::Moved) => {
                projection.advance(partition, next, false).await?;
                self.jobs.notify_one();
                self.fan_out.fanned(events, authors).await.map_err(retry)?
            }
            Err(error) if error.is_a_rows() => return Ok(Err(error)),
            Err(error) => return Err(retry(error)),
        };
        let rows: usize = fanned.iter().map(|(_, posts)| posts.len()).sum();
        counter!("postrider_feed_events_total").increment(events.len() as u64);
        counter!("postrider_feed_rows_total").increment(rows as u64);
        self.update_timelines(events, authors, fanned).await.map(Ok)
    }

    /// Adds posts to the timelines of the users whose feeds have them, and of authors who are
    /// merged.
    async fn update_timelines(&self, events: &[Event], authors: &Authors, fanned: Fanned) -> Result<(), Failure> {
        let mut additions: Vec<_> = fanned.into_iter().map(|(user, posts)| (Owner::User(user), posts)).collect();
        let merged = events.iter().filter_map(|event| match &event.change {
            Change::Created { post_id, author } if authors.get(author)?.is_merged() => Some((*post_id, author)),
            _ => None,
        });
        let merged: HashMap<i64, &String> = merged.collect();
        // A duplicate of an event may arrive long after its post was deleted.
        for post_id in self.fan_out.live(merged.keys().copied().collect()).await.map_err(retry)? {
            additions.push((Owner::Author(merged[&post_id].clone()), vec![post_id]));
        }
        self.timelines.add(additions).await.map_err(retry)
    }
}

impl Project for Projector {
    type Row = Event;

    const EPOCH: &'static str = "feed.epoch";

    fn progress(&self) -> &Progress {
        &self.progress
    }

    fn row(&self, _: i32, record: &Record<'_>) -> Result<Event, Reason> {
        record::read(record)
    }

    fn offset(event: &Event) -> i64 {
        event.offset
    }

    async fn append(
        &self,
        projection: &Projection<Self>,
        partition: &mut Partition,
        events: &[Event],
        end: i64,
    ) -> Result<Result<(), Error>, Failure> {
        let begun = Instant::now();
        let authors = self.fan_out.authors(events.iter()).await.map_err(retry)?;
        let (applied, mut fresh) = events.split_at(events.partition_point(|event| event.offset < partition.next));
        if !applied.is_empty() {
            let fanned = self.fan_out.fanned(applied, &authors).await.map_err(retry)?;
            self.update_timelines(applied, &authors, fanned).await?;
            counter!("postrider_feed_duplicate_records_total").increment(applied.len() as u64);
        }
        loop {
            let (run, rest) = fresh.split_at(self.run(fresh, &authors));
            let next = rest.first().map_or(end, |event| event.offset);
            if next > partition.next
                && let Err(error) = self.apply(projection, partition, run, next, &authors).await?
            {
                return Ok(Err(error));
            }
            if rest.is_empty() {
                tokio::time::sleep(PACE.saturating_sub(begun.elapsed())).await;
                return Ok(Ok(()));
            }
            fresh = rest;
        }
    }
}

fn retry(error: Error) -> Failure {
    Failure::Retry(error.to_string())
}
