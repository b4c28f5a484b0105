//! Reads from the view, many with one round trip.
//!
//! Reads that arrive during a query wait for it and then share one HMGET per partition, because a
//! command, a wake-up and a system call each would cost more than the reads. A read that arrives
//! alone does not wait.

use postrider_microbatch::{Batches, Queue, Request, queue};
use postrider_redis::Redis;
use redis::{Cmd, Value};
use tokio::sync::watch;

use super::{
    entry::Marker,
    keys::{Keys, MARKER_FIELD},
};

/// Maximum number of reads per query, and target size of the answers in bytes. After larger
/// answers, fewer reads share a query, until answers are small again.
const MAX_TOGETHER: usize = 64;
const ANSWER_BYTES: usize = 8 << 20;
/// Maximum number of queued reads; beyond it, requests wait to enqueue.
const QUEUE: usize = 4_096;

/// Marker of a partition and entry of a key in it, or the Redis error.
pub(super) type Found = Result<(Option<Marker>, Option<Vec<u8>>), String>;

struct Key {
    partition: usize,
    key: String,
}

type Read = Request<Key, Found>;

/// Queue of reads. Cheap to clone.
#[derive(Clone)]
pub(super) struct Lookups(Queue<Key, Found>);

impl Lookups {
    /// Returns the queue and the task that serves it; see [`Asking::until_closed`].
    pub fn new(partitions: Vec<Keys>, redis: watch::Receiver<Option<Redis>>) -> (Self, Asking) {
        let (lookups, reads) = queue(QUEUE);
        (Self(lookups), Asking { reads, partitions, redis })
    }

    /// Reads a key and the marker of its partition atomically.
    pub async fn read(&self, partition: usize, key: &str) -> Found {
        let found = self.0.ask(Key { partition, key: key.to_owned() }).await;
        found.unwrap_or_else(|_| Err("the reader has stopped".to_owned()))
    }
}

/// The task that queries Redis.
pub struct Asking {
    reads: Batches<Key, Found>,
    partitions: Vec<Keys>,
    redis: watch::Receiver<Option<Redis>>,
}

impl Asking {
    /// Runs until every [`Lookups`] is dropped.
    pub async fn until_closed(mut self) {
        let (mut together, mut most) = (Vec::with_capacity(MAX_TOGETHER), MAX_TOGETHER);
        while self.reads.next(&mut together, most).await {
            let count = together.len();
            let bytes = self.answer(&mut together).await;
            most = next_most(most, count, bytes);
        }
    }

    /// Answers reads. Returns the size of all answers in bytes.
    async fn answer(&self, reads: &mut Vec<Read>) -> usize {
        reads.sort_unstable_by_key(|read| read.question.partition);
        let redis = self.redis.borrow().clone();
        let Some(mut redis) = redis else {
            answer_all(reads.drain(..), &Err("Redis is not connected yet".to_owned()));
            return 0;
        };
        let mut bytes = 0;
        let of_one_partition = |one: &Read, other: &Read| one.question.partition == other.question.partition;
        let commands = reads.chunk_by(of_one_partition).map(|group| self.command(group)).collect();
        let sizes: Vec<usize> = reads.chunk_by(of_one_partition).map(<[Read]>::len).collect();
        let answers = redis.ask(commands).await;
        for (size, answer) in sizes.into_iter().zip(answers) {
            let group = reads.drain(..size);
            match answer {
                Ok(Value::Array(values)) => bytes += settle(group, values),
                Ok(other) => answer_all(group, &Err(format!("unexpected answer {other:?}"))),
                Err(error) => answer_all(group, &Err(error.to_string())),
            }
        }
        // Empty, unless Redis returned fewer answers than commands.
        answer_all(reads.drain(..), &Err("Redis returned too few answers".to_owned()));
        bytes
    }

    fn command(&self, group: &[Read]) -> Cmd {
        let mut command = redis::cmd("HMGET");
        let view = group.first().and_then(|read| self.partitions.get(read.question.partition));
        command.arg(view.map_or("", |keys| &keys.view)).arg(MARKER_FIELD);
        for read in group {
            command.arg(&read.question.key);
        }
        command
    }
}

/// Returns how many reads may share the next query, after `count` reads returned `bytes`.
fn next_most(most: usize, count: usize, bytes: usize) -> usize {
    if bytes > ANSWER_BYTES { (count * ANSWER_BYTES / bytes).max(1) } else { (most * 2).min(MAX_TOGETHER) }
}

/// Answers each read. Ignores callers that have stopped waiting. Returns the size of all values in
/// bytes.
fn settle(group: impl Iterator<Item = Read>, values: Vec<Value>) -> usize {
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
    for read in group {
        let found = next().and_then(|entry| Ok((marker.clone()?, entry)));
        bytes += found.as_ref().ok().and_then(|(_, entry)| entry.as_ref()).map_or(0, Vec::len);
        read.answer(found);
    }
    bytes
}

fn answer_all(group: impl Iterator<Item = Read>, found: &Found) {
    for read in group {
        read.answer(found.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_answers_shrink_the_next_query_and_small_ones_let_it_grow() {
        const MIB: usize = 1 << 20;
        let few = next_most(64, 64, 64 * MIB);
        assert_eq!(few, 8);
        assert_eq!(next_most(few, 8, 8 * MIB), 16);
        assert_eq!(next_most(2, 2, 64 * MIB), 1, "at least one");
        assert_eq!(next_most(64, 64, MIB), 64);
    }
}
