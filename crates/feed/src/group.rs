//! Writes that share a commit. Concurrent requests join the next group while other groups are being
//! written; a request that arrives alone is written at once. If Postgres rejects a row, its group
//! is split in halves until that row is alone.

use std::{future::Future, sync::Arc, time::Duration};

use metrics::histogram;
use postrider_http::{Code, Problem};
use postrider_microbatch::{Batches, Queue, Request, queue};
use postrider_outbox_backlog::Hint;
use postrider_postgres::query::Error;
use tokio::{
    sync::{Semaphore, oneshot},
    task::JoinSet,
};

/// Maximum number of requests that wait for a group; further ones are rejected.
const QUEUE: usize = 4_096;
/// Maximum time of a write, including its wait for a group.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of attempts to write a group that conflicts with others on the same rows.
const ATTEMPTS: u32 = 4;

/// A kind of write that can be grouped.
pub trait Writing: Send + Sync + 'static {
    type Item: Send + Sync + 'static;
    type Outcome: Send + 'static;

    /// Writes all items or none, in one transaction. Outcomes are in the order of the items.
    fn write(&self, items: &[Self::Item]) -> impl Future<Output = Result<Vec<Self::Outcome>, Refusal>> + Send;
}

/// The reason why an item is not known to be written.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Refusal {
    #[error("too many writes wait for Postgres; retry later")]
    Full,
    /// Nothing was written.
    #[error("{0}")]
    Unavailable(String),
    /// The commit was requested but not confirmed.
    #[error("{0}")]
    Unknown(String),
    /// The transaction conflicted with another one; nothing was written.
    #[error("{0}")]
    Clash(String),
    /// Postgres rejects the row on every attempt.
    #[error("{0}")]
    Row(String),
}

impl Refusal {
    /// Classifies the error of a statement that was its own transaction.
    pub fn of(error: &Error) -> Self {
        let text = error.to_string();
        match error {
            error if error.is_a_rows() => Self::Row(text),
            Error::Database(sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed) => Self::Unavailable(text),
            Error::Database(sqlx::Error::Database(error)) => match error.code().as_deref() {
                Some(code) if code.starts_with("40") => Self::Clash(text),
                // Terminated by an administrator, perhaps in the middle of the commit.
                Some(code) if code.starts_with("57P0") => Self::Unknown(text),
                _ => Self::Unavailable(text),
            },
            _ => Self::Unknown(text),
        }
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let code = match refusal {
            Refusal::Full => Code::OVERLOADED,
            Refusal::Unavailable(_) | Refusal::Clash(_) => Code::POSTGRES_UNAVAILABLE,
            Refusal::Unknown(_) => Code::OUTCOME_UNKNOWN,
            Refusal::Row(_) => Code::INVALID_FIELD,
        };
        Self::new(code, refusal.to_string())
    }
}

type Settled<W> = Result<<W as Writing>::Outcome, Refusal>;

/// Entry point for requests that write an item.
pub struct Group<W: Writing>(Queue<W::Item, Settled<W>>);

impl<W: Writing> Clone for Group<W> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// The task that forms groups and writes them.
pub struct Grouping<W: Writing> {
    waiting: Batches<W::Item, Settled<W>>,
    writing: Arc<W>,
    hint: Arc<Hint>,
    rows: usize,
    in_flight: usize,
}

impl<W: Writing> Group<W> {
    /// Creates a group and the task that writes its items; run the task with
    /// [`Grouping::until_closed`].
    pub fn new(writing: W, hint: Arc<Hint>, rows: usize, in_flight: usize) -> (Self, Grouping<W>) {
        let (sender, waiting) = queue(QUEUE);
        let (rows, in_flight) = (rows.max(1), in_flight.max(1));
        (Self(sender), Grouping { waiting, writing: Arc::new(writing), hint, rows, in_flight })
    }

    /// Writes an item, together with those of other requests.
    pub async fn write(&self, item: W::Item) -> Result<W::Outcome, Refusal> {
        let outcome = self.0.try_ask(item).map_err(|_| Refusal::Full)?;
        let detail = "Postgres did not confirm the write in time; check it before retrying";
        let no_answer = || Refusal::Unknown(detail.to_owned());
        tokio::time::timeout(WRITE_TIMEOUT, outcome).await.map_err(|_| no_answer())?.map_err(|_| no_answer())?
    }
}

impl<W: Writing> Grouping<W> {
    /// Runs until every [`Group`] is dropped and all accepted items are settled.
    pub async fn until_closed(mut self) {
        let permits = Arc::new(Semaphore::new(self.in_flight));
        let mut running = JoinSet::new();
        while let Ok(permit) = permits.clone().acquire_owned().await {
            let mut group = Vec::new();
            if !self.waiting.next(&mut group, self.rows).await {
                break;
            }
            histogram!("postrider_feed_group_rows").record(group.len() as f64);
            let (writing, hint) = (self.writing.clone(), self.hint.clone());
            running.spawn(async move {
                settle(&*writing, group).await;
                drop(permit);
                hint.give().await;
            });
            while running.try_join_next().is_some() {}
        }
        while running.join_next().await.is_some() {}
    }
}

/// Writes a group and sends each request its outcome.
async fn settle<W: Writing>(writing: &W, group: Vec<Request<W::Item, Settled<W>>>) {
    let (mut items, mut answers): (Vec<_>, Vec<_>) =
        group.into_iter().map(Request::into_parts).map(|(item, answer)| (item, Some(answer))).unzip();
    // Ranges of items still to write, the next one last.
    let mut pieces = vec![(0, items.len())];
    while let Some((from, to)) = pieces.pop() {
        let piece = &mut items[from..to];
        match attempt(writing, piece).await {
            Ok(outcomes) => {
                for (answer, outcome) in answers[from..to].iter_mut().zip(outcomes) {
                    send(answer, Ok(outcome));
                }
            }
            Err(Refusal::Row(_)) if piece.len() > 1 => {
                let middle = from + piece.len() / 2;
                pieces.extend([(middle, to), (from, middle)]);
            }
            Err(refusal) => answers[from..to].iter_mut().for_each(|answer| send(answer, Err(refusal.clone()))),
        }
    }
}

async fn attempt<W: Writing>(writing: &W, items: &[W::Item]) -> Result<Vec<W::Outcome>, Refusal> {
    let mut attempts = 1;
    loop {
        match writing.write(items).await {
            Err(Refusal::Clash(_)) if attempts < ATTEMPTS => {
                attempts += 1;
                tokio::time::sleep(Duration::from_millis(fastrand::u64(1..30))).await;
            }
            settled => return settled,
        }
    }
}

/// Sends an outcome. A request that no longer waits is ignored.
fn send<T>(answer: &mut Option<oneshot::Sender<T>>, outcome: T) {
    if let Some(answer) = answer.take() {
        let _ = answer.send(outcome);
    }
}
