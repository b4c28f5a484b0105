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

/// Reads that are asked together at most, and what they may bring: after an answer with more than that, fewer are asked
/// together, until answers are small again.
const MAX_TOGETHER: usize = 64;
const ANSWER_BYTES: usize = 8 << 20;
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
        let (mut together, mut most) = (Vec::with_capacity(MAX_TOGETHER), MAX_TOGETHER);
        while gather(&mut self.questions, &mut together, most).await {
            let count = together.len();
            let bytes = self.answer(&mut together).await;
            most = next_most(most, count, bytes);
        }
    }

    /// Answers questions. Returns the bytes of all answers.
    async fn answer(&self, questions: &mut Vec<Question>) -> usize {
        questions.sort_unstable_by_key(|question| question.partition);
        let redis = self.redis.borrow().clone();
        let Some(mut redis) = redis else {
            tell(questions.drain(..), &Err("Redis is not connected yet".to_owned()));
            return 0;
        };
        let mut bytes = 0;
        let of_one_partition = |one: &Question, other: &Question| one.partition == other.partition;
        let commands = questions.chunk_by(of_one_partition).map(|group| self.command(group)).collect();
        let sizes: Vec<usize> = questions.chunk_by(of_one_partition).map(<[Question]>::len).collect();
        let answers = redis.ask(commands).await;
        for (size, answer) in sizes.into_iter().zip(answers) {
            let group = questions.drain(..size);
            match answer {
                Ok(Value::Array(values)) => bytes += settle(group, values),
                Ok(other) => tell(group, &Err(format!("unexpected answer {other:?}"))),
                Err(error) => tell(group, &Err(error.to_string())),
            }
        }
        // None are left, unless the client gave fewer answers than it was asked.
        tell(questions.drain(..), &Err("no answer".to_owned()));
        bytes
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

/// Returns how many reads may be asked together, after so many have brought so much.
fn next_most(most: usize, count: usize, bytes: usize) -> usize {
    if bytes > ANSWER_BYTES { (count * ANSWER_BYTES / bytes).max(1) } else { (most * 2).min(MAX_TOGETHER) }
}

/// Gives each question its value; who went away meanwhile needs none. Returns the bytes of all values.
fn settle(group: impl Iterator<Item = Question>, values: Vec<Value>) -> usize {
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
    let mut bytes = 0;
    for question in group {
        let found = next().and_then(|entry| Ok((marker.clone()?, entry)));
        bytes += found.as_ref().ok().and_then(|(_, entry)| entry.as_ref()).map_or(0, Vec::len);
        let _ = question.answer.send(found);
    }
    bytes
}

fn tell(group: impl Iterator<Item = Question>, found: &Found) {
    for question in group {
        let _ = question.answer.send(found.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_answers_make_the_next_ones_smaller_and_small_ones_give_the_room_back() {
        const MIB: usize = 1 << 20;
        let few = next_most(64, 64, 64 * MIB);
        assert_eq!(few, 8);
        assert_eq!(next_most(few, 8, 8 * MIB), 16);
        assert_eq!(next_most(2, 2, 64 * MIB), 1, "one at least");
        assert_eq!(next_most(64, 64, MIB), 64);
    }
}
