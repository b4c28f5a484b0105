//! Publishes stored messages to api processes through Redis.
//!
//! Publishing never delays the projection: notices that cannot be queued are dropped. Once Redis
//! answers again, all api processes are notified that notices are missing, and read the messages of
//! their connections from Postgres.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use metrics::counter;
use postrider_kafka::PartitionId;
use postrider_redis::Redis;
use redis::Cmd;
use tokio::{
    sync::{Mutex, mpsc, watch},
    time::{MissedTickBehavior, interval},
};

use super::{channel, item::Notice, missed_channel};

/// Maximum number of queued batches.
const WAITING_BATCHES: usize = 32;
/// Maximum number of batches sent to Redis together, because batches of one partition are small.
const TOGETHER: usize = 16;
/// Interval at which missing notices are reported to api processes, and at which that is retried.
const MISSED_PAUSE: Duration = Duration::from_millis(250);

/// The publisher of a projection.
pub struct Publisher {
    key_prefix: String,
    sender: mpsc::Sender<Vec<Cmd>>,
    receiver: Mutex<mpsc::Receiver<Vec<Cmd>>>,
    /// True if notices are or may be missing and api processes have not been notified.
    missed: AtomicBool,
}

/// A stored message.
pub struct News<'a> {
    pub receiver: &'a str,
    pub offset: i64,
    pub prev: i64,
    /// Empty to announce only the position.
    pub value: &'a str,
}

impl Publisher {
    pub fn new(key_prefix: String) -> Arc<Self> {
        let (sender, receiver) = mpsc::channel(WAITING_BATCHES);
        Arc::new(Self { key_prefix, sender, receiver: Mutex::new(receiver), missed: AtomicBool::new(false) })
    }

    /// Makes api processes look for messages that a previous owner may have stored but not
    /// announced.
    pub fn suspect_missed(&self) {
        self.missed.store(true, Relaxed);
        // Wakes `run`. If the queue is full, `run` is awake already.
        let _ = self.sender.try_send(Vec::new());
    }

    /// Queues the notices of one batch in order, or drops them if the queue is full.
    pub fn publish<'a>(&self, partition_id: PartitionId, news: impl Iterator<Item = News<'a>>) {
        let command = |news: News<'_>| {
            let mut publish = redis::cmd("PUBLISH");
            publish.arg(channel(&self.key_prefix, news.receiver));
            publish.arg(Notice::encode(partition_id, news.offset, news.prev, news.value));
            publish
        };
        let commands: Vec<Cmd> = news.map(command).collect();
        let count = commands.len() as u64;
        if count > 0 && self.sender.try_send(commands).is_err() {
            self.lost(count);
        }
    }

    /// Publishes queued notices; runs forever.
    pub async fn run(self: Arc<Self>, redis: watch::Receiver<Option<Redis>>) {
        let mut batches = self.receiver.lock().await;
        let mut waiting = Vec::with_capacity(TOGETHER);
        let mut due = interval(MISSED_PAUSE);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                taken = batches.recv_many(&mut waiting, TOGETHER) => match taken {
                    0 => return,
                    _ => self.announce(&redis, waiting.drain(..).flatten().collect()).await,
                },
                _ = due.tick(), if self.missed.load(Relaxed) => self.announce_missed(&redis).await,
            }
        }
    }

    async fn announce(&self, redis: &watch::Receiver<Option<Redis>>, commands: Vec<Cmd>) {
        let count = commands.len() as u64;
        let connected = redis.borrow().clone();
        let Some(mut redis) = connected else { return self.lost(count) };
        let answers = redis.ask(commands).await;
        let failed = answers.iter().filter(|answer| answer.is_err()).count() as u64;
        counter!("postrider_messages_published_total").increment(count - failed);
        if let Some(Err(error)) = answers.iter().find(|answer| answer.is_err()) {
            tracing::debug!(error = %error, failed, "publishing stored messages failed");
            self.lost(failed);
        }
    }

    async fn announce_missed(&self, redis: &watch::Receiver<Option<Redis>>) {
        let connected = redis.borrow().clone();
        let Some(mut redis) = connected else { return };
        // Reset before sending, so that notices lost meanwhile set it again.
        self.missed.store(false, Relaxed);
        let mut publish = redis::cmd("PUBLISH");
        publish.arg(missed_channel(&self.key_prefix)).arg("");
        if let Err(error) = publish.query_async::<()>(&mut redis).await {
            tracing::debug!(error = %error, "publishing the missed-messages notice failed");
            self.missed.store(true, Relaxed);
        }
    }

    fn lost(&self, count: u64) {
        counter!("postrider_messages_unannounced_total").increment(count);
        if count > 0 {
            self.missed.store(true, Relaxed);
        }
    }
}
