//! Common part of projections into tables. Besides the data, a projection stores its progress,
//! which is the next offset of every partition of its topic, and updates both together.
//!
//! Reading starts at the group's commit, even if the tables are ahead: a crash may have come after
//! the write to the tables but before a following effect, such as a dead letter. If the tables are
//! behind, as after a restore, reading starts at their progress.

use std::{future::Future, sync::Arc};

use postrider_health::Check;
use postrider_kafka::{
    batch::{Batch, Record},
    consumer::{Assignment, BatchHandler, Failure, Poison},
    dead_letter::Reason,
};
use postrider_postgres::query::Error;

use super::{progress::Progress, status::ProjectionStatus};

/// Capability-specific part of a projection.
pub trait Project: Send + Sync + 'static {
    /// Row that a record is stored as.
    type Row: Send + Sync;

    /// Name of the setting that has to be raised when the topic was replaced.
    const EPOCH: &'static str;

    /// Returns where the progress is stored.
    fn progress(&self) -> &Progress;

    /// Called when this process begins to read a partition.
    fn began(&self) {}

    /// Returns the row of a record, or the reason why the record cannot be stored.
    fn row(&self, partition: i32, record: &Record<'_>) -> Result<Self::Row, Reason>;

    fn offset(row: &Self::Row) -> i64;

    /// Stores those of the rows that are not stored yet and moves the progress from
    /// `partition.next` to `next`, in one statement, then calls [`Projection::advance`]. The inner
    /// error means that the database rejected a row because of its data; nothing was changed.
    fn append(
        &self,
        projection: &Projection<Self>,
        partition: &mut Partition,
        rows: &[Self::Row],
        next: i64,
    ) -> impl Future<Output = Result<Result<(), Error>, Failure>> + Send
    where
        Self: Sized;
}

/// Progress of one partition.
#[derive(Debug)]
pub struct Partition {
    pub number: i32,
    /// Next offset to store; everything below is stored.
    pub next: i64,
    /// End of the topic when the partition was gained; `None` once it is reached.
    behind: Option<i64>,
}

/// Runs a capability's projection.
pub struct Projection<P> {
    project: Arc<P>,
    status: ProjectionStatus,
}

impl<P: Project> Projection<P> {
    /// Creates a projection; `check` is its readiness check.
    pub fn new(project: Arc<P>, check: Check) -> Arc<Self> {
        Arc::new(Self { project, status: ProjectionStatus::new(check) })
    }

    /// Sets the progress to `next`. `moved` is false if the stored progress was not the one that
    /// this writer expected.
    pub async fn advance(&self, partition: &mut Partition, next: i64, moved: bool) -> Result<(), Failure> {
        if !moved {
            // An earlier attempt may have succeeded although its answer was lost.
            let found = self.project.progress().next(partition.number).await.map_err(retry)?;
            if found != Some(next) {
                return Err(unexpected_progress(found));
            }
        }
        partition.next = next;
        Ok(())
    }

    /// Returns the failure that holds a partition whose topic is not the one that was read before.
    pub fn refuse(&self, partition: i32, observation: &str) -> Failure {
        let problem = format!(
            "the topic {observation}: it was replaced or truncated; raise `{}`, which keeps the stored rows and reads the topic with a new consumer group",
            P::EPOCH
        );
        self.status.report(partition, Some(problem.clone()));
        Failure::Retry(problem)
    }

    /// Marks the partition as up to date with the topic's end at the time it was gained.
    fn reached(&self, partition: &mut Partition) {
        if partition.behind.take().is_some() {
            self.status.report(partition.number, None);
        }
    }
}

impl<P: Project> BatchHandler for Projection<P> {
    type Partition = Partition;

    async fn assigned(&self, assignment: Assignment) -> Result<(Partition, i64), Failure> {
        let Assignment { partition: number, committed, low, high } = assignment;
        let next = self.project.progress().begin(number, low).await.map_err(|error| {
            self.status.report(number, Some(error.to_string()));
            retry(error)
        })?;
        self.project.began();
        let done = next.max(committed.unwrap_or(0));
        if done > high {
            return Err(self.refuse(number, &format!("ends at offset {high}, before {done}, which was stored")));
        }
        if next < low {
            tracing::warn!(partition = number, next, low, "topic no longer has the next records, skipping them");
        }
        let from = committed.unwrap_or(next).min(next).max(low);
        let behind = (from < high).then_some(high);
        self.status.report(number, behind.map(|high| format!("at offset {from} of {high}")));
        Ok((Partition { number, next, behind }, from))
    }

    async fn apply(&self, partition: &mut Partition, batch: &Batch) -> Result<Vec<Poison>, Failure> {
        let Some(end) = batch.next_offset() else { return Ok(Vec::new()) };
        let (mut rows, mut poison) = (Vec::with_capacity(batch.len()), Vec::new());
        for record in batch.iter() {
            match self.project.row(partition.number, &record) {
                Ok(row) => rows.push(row),
                Err(reason) => poison.push(Poison { offset: record.offset(), reason }),
            }
        }
        let mut pieces = Pieces::new(&rows, end, P::offset);
        while let Some(piece) = pieces.take() {
            // Records that are read again do not move the progress back.
            let next = piece.next.max(partition.next);
            if let Err(error) = self.project.append(self, partition, piece.rows, next).await? {
                poison.extend(pieces.refuse(piece, &error)?);
            }
        }
        // If records keep arriving, the end of the log may never be reported.
        if partition.behind.is_some_and(|high| end >= high) {
            self.reached(partition);
        }
        Ok(poison)
    }

    async fn idle(&self, partition: &mut Partition) -> Result<(), Failure> {
        // The tables may have been restored to an earlier state while nothing was written.
        match self.project.progress().next(partition.number).await.map_err(retry)? {
            Some(next) if next == partition.next => Ok(()),
            found => Err(unexpected_progress(found)),
        }
    }

    async fn caught_up(&self, partition: &mut Partition) -> Result<(), Failure> {
        self.reached(partition);
        Ok(())
    }

    fn revoked(&self, partition: i32) {
        self.status.revoked(partition);
    }

    fn joined(&self, gained: &[i32]) {
        self.status.joined(gained);
    }

    fn left(&self) {
        self.status.left();
    }
}

/// Rows of a batch in order: first all at once, then, if a row is rejected, in halves until it is
/// alone.
struct Pieces<'a, R> {
    /// Pieces to store; the next one is the last element.
    waiting: Vec<Piece<'a, R>>,
    offset: fn(&R) -> i64,
}

struct Piece<'a, R> {
    rows: &'a [R],
    /// Progress once these rows are stored.
    next: i64,
}

impl<'a, R> Pieces<'a, R> {
    fn new(rows: &'a [R], next: i64, offset: fn(&R) -> i64) -> Self {
        Self { waiting: vec![Piece { rows, next }], offset }
    }

    fn take(&mut self) -> Option<Piece<'a, R>> {
        self.waiting.pop()
    }

    /// Handles the rejection of a piece. A piece of several rows is split into halves, which are
    /// tried next; a single row is dead-lettered.
    fn refuse(&mut self, Piece { rows, next }: Piece<'a, R>, error: &Error) -> Result<Option<Poison>, Failure> {
        match rows {
            [] => Err(Failure::Retry(error.to_string())),
            [row] => {
                self.waiting.push(Piece { rows: &[], next });
                let reason = Reason { class: "refused", message: error.to_string() };
                Ok(Some(Poison { offset: (self.offset)(row), reason }))
            }
            rows => {
                let (left, right) = rows.split_at(rows.len() / 2);
                let between = (self.offset)(&right[0]);
                self.waiting.extend([Piece { rows: right, next }, Piece { rows: left, next: between }]);
                Ok(None)
            }
        }
    }
}

fn retry(error: Error) -> Failure {
    Failure::Retry(error.to_string())
}

/// Returns the failure that restarts the partition, because another writer moved the progress or
/// the tables lost it.
fn unexpected_progress(found: Option<i64>) -> Failure {
    Failure::Restart(found.map_or("the stored progress is missing".to_owned(), |next| {
        format!("the stored progress is at offset {next}, which this writer did not expect")
    }))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Returns the stored rows, the rejected rows, and the progress after each piece.
    fn store(rows: &[i64], end: i64, bad: &[i64]) -> (Vec<i64>, Vec<i64>, Vec<i64>) {
        let (mut stored, mut refused, mut progress) = (Vec::new(), Vec::new(), Vec::new());
        let mut pieces = Pieces::new(rows, end, |offset| *offset);
        while let Some(piece) = pieces.take() {
            if piece.rows.iter().any(|row| bad.contains(row)) {
                refused.extend(
                    pieces.refuse(piece, &Error::TimedOut(Duration::ZERO)).unwrap().map(|poison| poison.offset),
                );
            } else {
                stored.extend(piece.rows);
                progress.push(piece.next);
            }
        }
        (stored, refused, progress)
    }

    #[test]
    fn rejected_rows_are_found_and_all_others_are_stored_in_order() {
        let rows = [10, 11, 14, 15, 16, 19];
        assert_eq!(store(&rows, 25, &[]), (rows.to_vec(), vec![], vec![25]));
        let (stored, refused, progress) = store(&rows, 25, &[11, 19]);
        assert_eq!((stored, refused), (vec![10, 14, 15, 16], vec![11, 19]));
        assert!(progress.is_sorted() && progress.last() == Some(&25), "{progress:?}");
        assert_eq!(store(&rows, 25, &rows).1, rows);
        assert_eq!(store(&[], 25, &[]), (vec![], vec![], vec![25]), "the progress moves without rows, too");
    }

    #[test]
    fn a_failure_to_move_the_progress_without_rows_is_retried() {
        let mut pieces = Pieces::new(&[], 25, |offset: &i64| *offset);
        let piece = pieces.take().unwrap();
        assert!(matches!(pieces.refuse(piece, &Error::TimedOut(Duration::ZERO)), Err(Failure::Retry(_))));
    }
}
