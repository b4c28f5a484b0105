//! Reads out of the view, many in one go.
//!
//! While one question is on its way to Redis, others come. They wait for its answer and then go
//! together, with one HMGET for each partition: a command, a wake-up and a system call each would
//! cost more than the reads do. A read that comes alone waits for nobody.

use redis::{Cmd, Value};
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    entry::Marker,
    keys::{Keys, MARKER_FIELD},
};
use crate::platform::{gather::gather, redis::Redis};

/// Reads that are asked together at most, to bound what one answer holds.
const MAX_TOGETHER: usize = 256;
/// Reads that wait to be asked; beyond it, requests wait to get here.
const QUEUE: usize = 4_096;

/// The marker of a partition and the entry of a key in it; or why Redis cannot say.
pub(super) type Found = Result<(Option<Marker>, Option<Vec<u8>>), String>;

struct Question {
    partition: usize,
    key: String,
    answer: oneshot::Sender<Found>,
}

/// Where questions are put. Cheap to clone.
#[derive(Clone)]
pub(super) struct Lookups(mpsc::Sender<Question>);

impl Lookups {
    /// The second half asks; see [`Asking::until_closed`].
    pub fn new(partitions: Vec<Keys>, redis: watch::Receiver<Option<Redis>>) -> (Self, Asking) {
        let (sender, questions) = mpsc::channel(QUEUE);
        (Self(sender), Asking { questions, partitions, redis })
    }

    /// Reads a key and the marker of its partition, as they are at one moment.
    pub async fn read(&self, partition: usize, key: &str) -> Found {
        let gone = || "the reader has stopped".to_owned();
        let (answer, found) = oneshot::channel();
        self.0.send(Question { partition, key: key.to_owned(), answer }).await.map_err(|_| gone())?;
        found.await.map_err(|_| gone())?
    }
}

/// The task that asks Redis.
pub struct Asking {
    questions: mpsc::Receiver<Question>,
    partitions: Vec<Keys>,
    redis: watch::Receiver<Option<Redis>>,
}

impl Asking {
    /// Runs until nobody is left who could ask.
    pub async fn until_closed(mut self) {
        let mut together = Vec::with_capacity(MAX_TOGETHER);
        while gather(&mut self.questions, &mut together, MAX_TOGETHER).await {
            self.answer(&mut together).await;
        }
    }

    async fn answer(&self, questions: &mut Vec<Question>) {
        questions.sort_unstable_by_key(|question| question.partition);
        let redis = self.redis.borrow().clone();
        let Some(mut redis) = redis else {
            return tell(questions.drain(..), &Err("Redis is not connected yet".to_owned()));
        };
        let of_one_partition = |one: &Question, other: &Question| one.partition == other.partition;
        let commands = questions.chunk_by(of_one_partition).map(|group| self.command(group)).collect();
        let sizes: Vec<usize> = questions.chunk_by(of_one_partition).map(<[Question]>::len).collect();
        let answers = redis.ask(commands).await;
        for (size, answer) in sizes.into_iter().zip(answers) {
            let group = questions.drain(..size);
            match answer {
                Ok(Value::Array(values)) => settle(group, values),
                Ok(other) => tell(group, &Err(format!("unexpected answer {other:?}"))),
                Err(error) => tell(group, &Err(error.to_string())),
            }
        }
        // None are left, unless the client gave fewer answers than it was asked.
        tell(questions.drain(..), &Err("no answer".to_owned()));
    }

    fn command(&self, group: &[Question]) -> Cmd {
        let mut command = redis::cmd("HMGET");
        let view = group.first().and_then(|question| self.partitions.get(question.partition));
        command.arg(view.map_or("", |keys| &keys.view)).arg(MARKER_FIELD);
        for question in group {
            command.arg(&question.key);
        }
        command
    }
}

/// Who went away meanwhile needs no answer.
fn settle(group: impl Iterator<Item = Question>, values: Vec<Value>) {
    let mut values = values.into_iter().map(|value| match value {
        Value::BulkString(bytes) => Ok(Some(bytes)),
        Value::Nil => Ok(None),
        other => Err(format!("unexpected value {other:?}")),
    });
    let mut next = || values.next().unwrap_or(Ok(None));
    let marker = next().and_then(|found| match found {
        Some(bytes) => Marker::decode(&bytes).map(Some).map_err(|unknown| unknown.to_string()),
        None => Ok(None),
    });
    for question in group {
        let found = next().and_then(|entry| Ok((marker.clone()?, entry)));
        let _ = question.answer.send(found);
    }
}

fn tell(group: impl Iterator<Item = Question>, found: &Found) {
    for question in group {
        let _ = question.answer.send(found.clone());
    }
}
