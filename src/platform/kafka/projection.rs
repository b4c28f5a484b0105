//! What projections into tables have in common: beside what each stores it keeps how far every partition of
//! its topic is, its progress, and moves both together.
//!
//! Reading starts at the group's commit, though the tables may have more: a crash may have come between them
//! and what follows, such as a dead letter. Where they have less, as after a restore, reading starts there.

use std::{future::Future, sync::Arc};

use super::{
    batch::{Batch, Record},
    consumer::{Assignment, BatchHandler, Failure, Poison},
    dead_letter::Reason,
    projection_status::ProjectionStatus,
};
use crate::platform::{ops::Check, query::Error};

/// A room's part of its projection.
pub trait Project: Send + Sync + 'static {
    /// What a record is stored as.
    type Row: Send + Sync;

    /// The setting that is raised when the topic was replaced.
    const EPOCH: &'static str;

    /// Up to where a partition is stored; `low`, which is noted, when nobody has begun with it.
    fn begin(&self, partition: i32, low: i64) -> impl Future<Output = Result<i64, Error>> + Send;

    /// Up to where a partition is stored; `None` when nobody has begun with it.
    fn progress(&self, partition: i32) -> impl Future<Output = Result<Option<i64>, Error>> + Send;

    /// What is to be stored of a record, or why nothing can be.
    fn row(&self, partition: i32, record: &Record<'_>) -> Result<Self::Row, Reason>;

    fn offset(row: &Self::Row) -> i64;

    /// Stores what is not there yet of these rows and moves the progress from `partition.next` to `next`, in
    /// one statement; then says so with [`Projection::advance`]. The inner error is for a row that is
    /// refused for its data; it leaves everything as it was.
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

/// Where one partition is.
#[derive(Debug)]
pub struct Partition {
    pub number: i32,
    /// Everything below is stored.
    pub next: i64,
    /// Where the topic ended when the partition was gained, until that is reached.
    behind: Option<i64>,
}

/// Runs a room's projection.
pub struct Projection<P> {
    room: Arc<P>,
    status: ProjectionStatus,
}

impl<P: Project> Projection<P> {
    /// `check` is what readiness shows of it.
    pub fn new(room: Arc<P>, check: Check) -> Arc<Self> {
        Arc::new(Self { room, status: ProjectionStatus::new(check) })
    }

    /// The progress was to be moved to `next`; `moved` says whether it was where this writer thinks.
    pub async fn advance(&self, partition: &mut Partition, next: i64, moved: bool) -> Result<(), Failure> {
        if !moved {
            // An attempt whose answer was lost may have done it already.
            let found = self.room.progress(partition.number).await.map_err(retry)?;
            if found != Some(next) {
                return Err(elsewhere(found));
            }
        }
        partition.next = next;
        Ok(())
    }

    /// Holds a partition whose topic is not the one that was read.
    pub fn refuse(&self, partition: i32, finding: &str) -> Failure {
        let problem = format!(
            "the topic {finding}: it was replaced or truncated; raise `{}`, which keeps what is stored and reads the topic under a new group position",
            P::EPOCH
        );
        self.status.report(partition, Some(problem.clone()));
        Failure::Retry(problem)
    }

    /// The partition has what there was when it was gained.
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
        let next = self.room.begin(number, low).await.map_err(|error| {
            self.status.report(number, Some(error.to_string()));
            retry(error)
        })?;
        let done = next.max(committed.unwrap_or(0));
        if done > high {
            return Err(self.refuse(number, &format!("ends at offset {high}, before {done}, which was stored")));
        }
        if next < low {
            tracing::warn!(partition = number, next, low, "the topic no longer has what comes next; it is passed over");
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
            match self.room.row(partition.number, &record) {
                Ok(row) => rows.push(row),
                Err(reason) => poison.push(Poison { offset: record.offset(), reason }),
            }
        }
        let mut pieces = Pieces::new(&rows, end, P::offset);
        while let Some(piece) = pieces.take() {
            // What is read again takes nothing back.
            let next = piece.next.max(partition.next);
            if let Err(error) = self.room.append(self, partition, piece.rows, next).await? {
                poison.extend(pieces.refuse(piece, &error)?);
            }
        }
        // The end of the log may never be met, where records keep coming.
        if partition.behind.is_some_and(|high| end >= high) {
            self.reached(partition);
        }
        Ok(poison)
    }

    async fn idle(&self, partition: &mut Partition) -> Result<(), Failure> {
        // The tables may have been restored to what they were while nothing was written.
        match self.room.progress(partition.number).await.map_err(retry)? {
            Some(next) if next == partition.next => Ok(()),
            found => Err(elsewhere(found)),
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

/// Rows of a batch in order: all of them at once or, where one is refused, in halves until it is alone.
struct Pieces<'a, R> {
    /// The next one on top.
    waiting: Vec<Piece<'a, R>>,
    offset: fn(&R) -> i64,
}

struct Piece<'a, R> {
    rows: &'a [R],
    /// Everything below is stored when these rows are.
    next: i64,
}

impl<'a, R> Pieces<'a, R> {
    fn new(rows: &'a [R], next: i64, offset: fn(&R) -> i64) -> Self {
        Self { waiting: vec![Piece { rows, next }], offset }
    }

    fn take(&mut self) -> Option<Piece<'a, R>> {
        self.waiting.pop()
    }

    /// One of these rows cannot be stored: halves are tried next, and a row that is alone is what it was.
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

/// Another writer was there, or the tables lost something: the partition is looked at anew.
fn elsewhere(found: Option<i64>) -> Failure {
    Failure::Restart(
        found.map_or("its progress is gone".to_owned(), |next| format!("its progress is at offset {next}")),
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// What is stored, what is refused, and where the progress is after each piece.
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
    fn rows_that_are_refused_are_found_and_all_others_are_stored_in_order() {
        let rows = [10, 11, 14, 15, 16, 19];
        assert_eq!(store(&rows, 25, &[]), (rows.to_vec(), vec![], vec![25]));
        let (stored, refused, progress) = store(&rows, 25, &[11, 19]);
        assert_eq!((stored, refused), (vec![10, 14, 15, 16], vec![11, 19]));
        assert!(progress.is_sorted() && progress.last() == Some(&25), "{progress:?}");
        assert_eq!(store(&rows, 25, &rows).1, rows);
        assert_eq!(store(&[], 25, &[]), (vec![], vec![], vec![25]), "the progress moves without rows, too");
    }

    #[test]
    fn a_progress_that_cannot_be_moved_without_rows_is_nobodys_fault() {
        let mut pieces = Pieces::new(&[], 25, |offset: &i64| *offset);
        let piece = pieces.take().unwrap();
        assert!(matches!(pieces.refuse(piece, &Error::TimedOut(Duration::ZERO)), Err(Failure::Retry(_))));
    }
}
