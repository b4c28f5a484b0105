//! Tells api processes through Redis what was stored.
//!
//! It never holds up the projection: what cannot be published in time is dropped, and its receivers find
//! it by the next message, which says what comes before it, or by looking now and then.

use std::sync::Arc;

use metrics::counter;
use redis::Cmd;
use tokio::sync::{Mutex, mpsc, watch};

use super::{channel, cursor::Lane, item::Notice};
use crate::platform::redis::Redis;

/// Batches that wait for Redis.
const WAITING_BATCHES: usize = 32;
/// Those that go to it together: partitions have batches of their own, which are small.
const TOGETHER: usize = 16;

/// The projection's end of it.
pub struct Publisher {
    key_prefix: String,
    sender: mpsc::Sender<Vec<Cmd>>,
    receiver: Mutex<mpsc::Receiver<Vec<Cmd>>>,
}

/// One message that was stored.
pub struct News<'a> {
    pub receiver: &'a str,
    pub offset: i64,
    pub prev: i64,
    /// Empty to say no more than that there is something.
    pub value: &'a str,
}

impl Publisher {
    pub fn new(key_prefix: String) -> Arc<Self> {
        let (sender, receiver) = mpsc::channel(WAITING_BATCHES);
        Arc::new(Self { key_prefix, sender, receiver: Mutex::new(receiver) })
    }

    /// Takes the news of one batch, in order, or drops them.
    pub fn publish<'a>(&self, lane: Lane, news: impl Iterator<Item = News<'a>>) {
        let command = |news: News<'_>| {
            let mut publish = redis::cmd("PUBLISH");
            publish.arg(channel(&self.key_prefix, news.receiver));
            publish.arg(Notice::encode(lane, news.offset, news.prev, news.value));
            publish
        };
        let commands: Vec<Cmd> = news.map(command).collect();
        let count = commands.len() as u64;
        if count > 0 && self.sender.try_send(commands).is_err() {
            lost(count);
        }
    }

    /// Publishes what waits, again and again.
    pub async fn run(self: Arc<Self>, redis: watch::Receiver<Option<Redis>>) {
        let mut batches = self.receiver.lock().await;
        let mut waiting = Vec::with_capacity(TOGETHER);
        while batches.recv_many(&mut waiting, TOGETHER).await > 0 {
            let commands: Vec<Cmd> = waiting.drain(..).flatten().collect();
            let count = commands.len() as u64;
            let connected = redis.borrow().clone();
            let Some(mut redis) = connected else {
                lost(count);
                continue;
            };
            let answers = redis.ask(commands).await;
            let failed = answers.iter().filter(|answer| answer.is_err()).count() as u64;
            counter!("postrider_messages_published_total").increment(count - failed);
            if let Some(Err(error)) = answers.iter().find(|answer| answer.is_err()) {
                tracing::debug!(error = %error, failed, "messages were stored and not announced");
                lost(failed);
            }
        }
    }
}

fn lost(count: u64) {
    counter!("postrider_messages_unannounced_total").increment(count);
}
