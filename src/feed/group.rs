//! Writes that share a commit. Concurrent requests wait for the group that is being formed while others are
//! under way; a request that comes alone goes at once. Where Postgres refuses a row, its group is halved until that
//! row is alone.

use std::{future::Future, sync::Arc, time::Duration};

use metrics::histogram;
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    task::JoinSet,
};

use crate::platform::{
    gather::gather,
    http::{Code, Problem},
    outbox::Hint,
    query::Error,
};

/// Requests that wait for a group; beyond it they are refused.
const QUEUE: usize = 4_096;
/// Time for a write, its wait for a group included.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a group is tried that met others at the same rows.
const ATTEMPTS: u32 = 4;

/// What is written together.
pub trait Writing: Send + Sync + 'static {
    type Item: Send + Sync + 'static;
    type Outcome: Send + 'static;

    /// Writes all of them or none, in one transaction. Outcomes are in the items' order.
    fn write(&self, items: &[Self::Item]) -> impl Future<Output = Result<Vec<Self::Outcome>, Refusal>> + Send;
}

/// Why something is not known to be written.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Refusal {
    #[error("too many writes wait for Postgres")]
    Full,
    /// It is nowhere.
    #[error("{0}")]
    Unavailable(String),
    /// The commit was asked for, and there was no answer.
    #[error("{0}")]
    Unknown(String),
    /// Another transaction was in the way; none of it is done.
    #[error("{0}")]
    Clash(String),
    /// The row is refused however often it is tried.
    #[error("{0}")]
    Row(String),
}

impl Refusal {
    /// Of a statement that was a transaction by itself.
    pub fn of(error: &Error) -> Self {
        let text = error.to_string();
        match error {
            error if error.is_a_rows() => Self::Row(text),
            Error::Database(sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed) => Self::Unavailable(text),
            Error::Database(sqlx::Error::Database(error)) => match error.code().as_deref() {
                Some(code) if code.starts_with("40") => Self::Clash(text),
                // Ended by an administrator, perhaps in the middle of the commit.
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
            Refusal::Full => Code::Overloaded,
            Refusal::Unavailable(_) | Refusal::Clash(_) => Code::PostgresUnavailable,
            Refusal::Unknown(_) => Code::OutcomeUnknown,
            Refusal::Row(_) => Code::InvalidField,
        };
        Self::new(code, refusal.to_string())
    }
}

struct Waiting<W: Writing> {
    item: W::Item,
    answer: oneshot::Sender<Result<W::Outcome, Refusal>>,
}

/// Where requests put what they write.
pub struct Group<W: Writing>(mpsc::Sender<Waiting<W>>);

impl<W: Writing> Clone for Group<W> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// The task that forms groups.
pub struct Grouping<W: Writing> {
    waiting: mpsc::Receiver<Waiting<W>>,
    writing: Arc<W>,
    hint: Arc<Hint>,
    rows: usize,
    in_flight: usize,
}

impl<W: Writing> Group<W> {
    /// The second half writes; see [`Grouping::until_closed`].
    pub fn new(writing: W, hint: Arc<Hint>, rows: usize, in_flight: usize) -> (Self, Grouping<W>) {
        let (sender, waiting) = mpsc::channel(QUEUE);
        let (rows, in_flight) = (rows.max(1), in_flight.max(1));
        (Self(sender), Grouping { waiting, writing: Arc::new(writing), hint, rows, in_flight })
    }

    /// Writes one of them, together with others.
    pub async fn write(&self, item: W::Item) -> Result<W::Outcome, Refusal> {
        let (answer, outcome) = oneshot::channel();
        self.0.try_send(Waiting { item, answer }).map_err(|_| Refusal::Full)?;
        let gave_up = || Refusal::Unknown("there was no answer in time".to_owned());
        tokio::time::timeout(PATIENCE, outcome).await.map_err(|_| gave_up())?.map_err(|_| gave_up())?
    }
}

impl<W: Writing> Grouping<W> {
    /// Runs until nobody is left who could write, and what was taken is settled.
    pub async fn until_closed(mut self) {
        let permits = Arc::new(Semaphore::new(self.in_flight));
        let mut under_way = JoinSet::new();
        while let Ok(permit) = permits.clone().acquire_owned().await {
            let mut group = Vec::new();
            if !gather(&mut self.waiting, &mut group, self.rows).await {
                break;
            }
            histogram!("postrider_feed_group_rows").record(group.len() as f64);
            let (writing, hint) = (self.writing.clone(), self.hint.clone());
            under_way.spawn(async move {
                settle(&*writing, group).await;
                drop(permit);
                hint.give().await;
            });
            while under_way.try_join_next().is_some() {}
        }
        while under_way.join_next().await.is_some() {}
    }
}

/// Writes a group and tells everybody what came of it.
async fn settle<W: Writing>(writing: &W, group: Vec<Waiting<W>>) {
    let (mut items, mut answers): (Vec<_>, Vec<_>) =
        group.into_iter().map(|waiting| (waiting.item, Some(waiting.answer))).unzip();
    // Pieces as beginnings and ends, the next one on top.
    let mut pieces = vec![(0, items.len())];
    while let Some((from, to)) = pieces.pop() {
        let piece = &mut items[from..to];
        match attempt(writing, piece).await {
            Ok(outcomes) => {
                for (answer, outcome) in answers[from..to].iter_mut().zip(outcomes) {
                    tell(answer, Ok(outcome));
                }
            }
            Err(Refusal::Row(_)) if piece.len() > 1 => {
                let middle = from + piece.len() / 2;
                pieces.extend([(middle, to), (from, middle)]);
            }
            Err(refusal) => answers[from..to].iter_mut().for_each(|answer| tell(answer, Err(refusal.clone()))),
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

/// Who went away meanwhile needs no answer.
fn tell<T>(answer: &mut Option<oneshot::Sender<T>>, what: T) {
    if let Some(answer) = answer.take() {
        let _ = answer.send(what);
    }
}
