//! Where receivers are, asked for many of them in one go.
//!
//! When a process ends, its clients come to the others within a second or two: with a query for each of
//! them Postgres would be busy for longer than that. Who comes while one question is under way waits for
//! its answer, and goes with the next.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{Mutex, mpsc, oneshot},
    time::timeout,
};

use super::{cursor::Cursor, store::Store};

/// Receivers of one query at most.
const MAX_TOGETHER: usize = 256;
/// Receivers that wait to be asked for; beyond it, connections wait to get here.
const QUEUE: usize = 4_096;
/// For the query under way and the next.
const PATIENCE: Duration = Duration::from_secs(12);

/// A receiver.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReceiverPosition {
    /// The last message of each partition.
    pub last: Cursor,
    /// Up to where it is known to have got them.
    pub delivered: Cursor,
}

type Found = Result<ReceiverPosition, String>;

struct Question {
    receiver: Arc<str>,
    answer: oneshot::Sender<Found>,
}

/// Where questions are put, and answered from.
pub struct PositionLookup {
    sender: mpsc::Sender<Question>,
    questions: Mutex<mpsc::Receiver<Question>>,
}

impl Default for PositionLookup {
    fn default() -> Self {
        let (sender, questions) = mpsc::channel(QUEUE);
        Self { sender, questions: Mutex::new(questions) }
    }
}

impl PositionLookup {
    /// Where a receiver is, or why Postgres cannot say.
    pub async fn find(&self, receiver: Arc<str>) -> Found {
        let (answer, found) = oneshot::channel();
        let asked = async {
            self.sender.send(Question { receiver, answer }).await.ok()?;
            found.await.ok()
        };
        let found = timeout(PATIENCE, asked).await.ok().flatten();
        found.unwrap_or_else(|| Err("no answer in time".to_owned()))
    }

    /// Asks, again and again.
    pub async fn answer_forever(&self, store: &Store) {
        let mut questions = self.questions.lock().await;
        let mut together = Vec::with_capacity(MAX_TOGETHER);
        while questions.recv_many(&mut together, MAX_TOGETHER).await > 0 {
            // Who went away meanwhile needs no answer.
            together.retain(|question| !question.answer.is_closed());
            let receivers: Vec<&str> = together.iter().map(|question| &*question.receiver).collect();
            let found = store.positions(&receivers).await.map_err(|error| error.to_string());
            for Question { receiver, answer } in together.drain(..) {
                let position = found.as_ref().map(|positions| positions.get(&*receiver).cloned().unwrap_or_default());
                let _ = answer.send(position.map_err(Clone::clone));
            }
        }
    }
}
