//! Batches of several partitions, stored by one statement: with few messages in each, as live traffic has them,
//! statements and commits cost more than the rows do.

use futures_util::future::join_all;
use metrics::histogram;
use tokio::sync::{Mutex, mpsc, oneshot};

use super::store::{Appended, Batch, Store};
use crate::platform::{kafka::consumer::Failure, query::Error};

/// Batches that wait; a partition has one at a time, and waits for room.
const WAITING: usize = 64;
/// Statements at a time. Those that come meanwhile share the next one.
const AT_ONCE: usize = 2;
/// Rows of a statement, unless one batch alone has more.
const ROWS: usize = 2_000;

/// What came of a batch. The inner error is for a row that is refused for its data.
pub type Outcome = Result<Result<Appended, Error>, Failure>;

struct Waiting {
    batch: Batch,
    answer: oneshot::Sender<Outcome>,
}

/// Where partitions put their batches.
pub struct Appender(mpsc::Sender<Waiting>);

/// Stores them.
pub struct Writer {
    store: Store,
    epoch: u32,
    waiting: Mutex<mpsc::Receiver<Waiting>>,
}

impl Appender {
    /// The second half writes, to partitions of this epoch; see [`Writer::until_closed`].
    pub fn new(store: Store, epoch: u32) -> (Self, Writer) {
        let (sender, waiting) = mpsc::channel(WAITING);
        (Self(sender), Writer { store, epoch, waiting: Mutex::new(waiting) })
    }

    /// Stores a batch together with those of other partitions.
    pub async fn append(&self, batch: Batch) -> Outcome {
        let (answer, outcome) = oneshot::channel();
        let closed = || Failure::Retry("nobody stores any more".to_owned());
        self.0.send(Waiting { batch, answer }).await.map_err(|_| closed())?;
        outcome.await.map_err(|_| closed())?
    }
}

impl Writer {
    /// Runs until nobody is left who could bring anything, and what was taken is settled.
    pub async fn until_closed(self) {
        join_all((0..AT_ONCE).map(|_| self.write_until_closed())).await;
    }

    async fn write_until_closed(&self) {
        loop {
            let waiting = self.gather().await;
            if waiting.is_empty() {
                return;
            }
            let (batches, answers): (Vec<_>, Vec<_>) = waiting.into_iter().map(|one| (one.batch, one.answer)).unzip();
            histogram!("postrider_messages_statement_rows")
                .record(batches.iter().map(|batch| batch.rows.len()).sum::<usize>() as f64);
            for (outcome, answer) in self.store_all(&batches).await.into_iter().zip(answers) {
                // Whose partition was taken away meanwhile does not wait.
                let _ = answer.send(outcome);
            }
        }
    }

    /// A batch, and those that wait with it; none when no more will come.
    async fn gather(&self) -> Vec<Waiting> {
        let mut receiver = self.waiting.lock().await;
        let mut found: Vec<Waiting> = receiver.recv().await.into_iter().collect();
        let mut rows: usize = found.iter().map(|one| one.batch.rows.len()).sum();
        while rows < ROWS
            && let Ok(next) = receiver.try_recv()
        {
            rows += next.batch.rows.len();
            found.push(next);
        }
        found
    }

    async fn store_all(&self, batches: &[Batch]) -> Vec<Outcome> {
        match self.store.append(self.epoch, batches).await {
            Ok(appended) => appended.into_iter().map(|one| Ok(Ok(one))).collect(),
            Err(error) if !error.is_a_rows() => {
                batches.iter().map(|_| Err(Failure::Retry(error.to_string()))).collect()
            }
            Err(error) if batches.len() == 1 => vec![Ok(Err(error))],
            // Each by itself: only the one with that row is refused.
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
