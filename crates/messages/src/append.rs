//! Stores the batches of several partitions with one statement: live traffic has few messages per
//! batch, so statements and commits cost more than rows.

use futures_util::future::join_all;
use metrics::histogram;
use postrider_kafka::consumer::Failure;
use postrider_microbatch::{Batches, Queue, Request, queue};
use postrider_postgres::query::Error;
use tokio::sync::Mutex;

use super::store::{Appended, Batch, Store};

/// Maximum number of queued batches. A partition has one batch at a time and waits for space.
const WAITING: usize = 64;
/// Maximum number of concurrent statements. Batches that arrive meanwhile share the next one.
const AT_ONCE: usize = 2;
/// Maximum number of rows per statement, unless a single batch has more.
const ROWS: usize = 2_000;

/// Result of a batch. The inner error means that a row is invalid.
pub type Outcome = Result<Result<Appended, Error>, Failure>;

/// Accepts batches of partitions.
pub struct Appender(Queue<Batch, Outcome>);

/// Stores the accepted batches.
pub struct Writer {
    store: Store,
    epoch: u32,
    waiting: Mutex<Batches<Batch, Outcome>>,
}

impl Appender {
    /// Returns the appender and the writer, which stores batches of this epoch; see
    /// [`Writer::until_closed`].
    pub fn new(store: Store, epoch: u32) -> (Self, Writer) {
        let (appender, waiting) = queue(WAITING);
        (Self(appender), Writer { store, epoch, waiting: Mutex::new(waiting) })
    }

    /// Stores a batch, together with batches of other partitions.
    pub async fn append(&self, batch: Batch) -> Outcome {
        let closed = |_| Failure::Retry("the message store has stopped".to_owned());
        self.0.ask(batch).await.map_err(closed)?
    }
}

impl Writer {
    /// Runs until every appender is dropped and all accepted batches are stored.
    pub async fn until_closed(self) {
        join_all((0..AT_ONCE).map(|_| self.write_until_closed())).await;
    }

    async fn write_until_closed(&self) {
        let mut waiting = Vec::new();
        while self.gather(&mut waiting).await {
            let (batches, answers): (Vec<_>, Vec<_>) = waiting.drain(..).map(Request::into_parts).unzip();
            histogram!("postrider_messages_statement_rows")
                .record(batches.iter().map(|batch| batch.rows.len()).sum::<usize>() as f64);
            for (outcome, answer) in self.store_all(&batches).await.into_iter().zip(answers) {
                // Ignores a partition that was revoked meanwhile.
                let _ = answer.send(outcome);
            }
        }
    }

    /// Takes the next batch and those queued behind it. Returns false after the last.
    async fn gather(&self, waiting: &mut Vec<Request<Batch, Outcome>>) -> bool {
        self.waiting.lock().await.next_weighed(waiting, ROWS, |batch| batch.rows.len()).await
    }

    async fn store_all(&self, batches: &[Batch]) -> Vec<Outcome> {
        match self.store.append(self.epoch, batches).await {
            Ok(appended) => appended.into_iter().map(|one| Ok(Ok(one))).collect(),
            Err(error) if !error.is_a_rows() => {
                batches.iter().map(|_| Err(Failure::Retry(error.to_string()))).collect()
            }
            Err(error) if batches.len() == 1 => vec![Ok(Err(error))],
            // Stores each batch separately, so that only the batch with the invalid row fails.
            Err(_) => {
                let mut outcomes = Vec::with_capacity(batches.len());
                for batch in batches {
                    outcomes.extend(Box::pin(self.store_all(std::slice::from_ref(batch))).await);
                }
                outcomes
            }
        }
    }
}
