//! The polling thread: membership, batches out, effects in, offsets stored.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, Ordering},
        mpsc as sync_mpsc,
    },
    time::{Duration, Instant},
};

use metrics::{counter, histogram};
use rdkafka::{
    Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, CommitMode, Consumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::BorrowedMessage,
};
use tokio::{runtime::Handle, sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use super::{
    Assignment, BatchHandler, Failure, REVOKE_DEADLINE, Subscription,
    callbacks::Context,
    worker::{Start, Work, Worker},
};
use crate::platform::{
    kafka::{Broker, Config, batch::Batch, off_runtime},
    ops::Beat,
};

/// How long a full partition holds up the others before it is paused.
const FULL_PATIENCE: Duration = Duration::from_millis(50);

type Client<H> = BaseConsumer<Context<H>>;

/// A consumer that has not begun to poll.
pub(super) struct Poller<H: BatchHandler> {
    client: Arc<Client<H>>,
    starts: sync_mpsc::Receiver<Start>,
    sender: sync_mpsc::Sender<Start>,
    subscription: Subscription,
    handler: Arc<H>,
    broker: Broker,
    runtime: Handle,
    generation: u64,
}

#[derive(Default)]
pub(super) struct Lanes {
    /// Partitions gained in a callback and not started yet.
    pub gained: Vec<i32>,
    active: BTreeMap<i32, Lane>,
}

impl Lanes {
    pub fn is_empty(&self) -> bool {
        self.gained.is_empty() && self.active.is_empty()
    }
}

struct Lane {
    work: mpsc::Sender<(u64, Work)>,
    /// Which start of the worker batches are for; 0 before its first.
    current: u64,
    filling: Batch,
    paused: bool,
    /// Everything below has its effect.
    done: Arc<AtomicI64>,
    /// The highest offset stored for commit; a replay never takes it back.
    stored: i64,
    revoked: CancellationToken,
    task: JoinHandle<()>,
    generation: u64,
}

pub(super) fn connect<H: BatchHandler>(
    config: &Config,
    subscription: &Subscription,
    handler: Arc<H>,
    broker: Broker,
) -> Result<Poller<H>, KafkaError> {
    let consumer = &config.consumer;
    let mut properties = config.client(subscription.name);
    properties
        .set("group.id", &subscription.group)
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("session.timeout.ms", consumer.session_timeout_ms.to_string())
        .set("heartbeat.interval.ms", (consumer.session_timeout_ms / 4).to_string())
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "true")
        .set("auto.commit.interval.ms", "1000")
        .set("enable.auto.offset.store", "false")
        .set("enable.partition.eof", "true")
        .set("allow.auto.create.topics", "false")
        .set("queued.max.messages.kbytes", consumer.prefetch_kib.to_string())
        .set("fetch.wait.max.ms", "500")
        .set("fetch.queue.backoff.ms", "5")
        .set("fetch.error.backoff.ms", "50");
    let context = Context { lanes: Arc::default(), topic: subscription.topic.clone(), handler: handler.clone() };
    let client: Client<H> = config.with_overrides(properties).create_with_context(context)?;
    client.subscribe(&[&subscription.topic])?;
    let (sender, starts) = sync_mpsc::channel();
    Ok(Poller {
        client: Arc::new(client),
        starts,
        sender,
        subscription: subscription.clone(),
        handler,
        broker,
        runtime: Handle::current(),
        generation: 0,
    })
}

impl<H: BatchHandler> Poller<H> {
    /// Polls until the stop, then finishes, commits and leaves.
    pub fn poll_until(mut self, stop: &CancellationToken, beat: &Beat) -> Result<(), KafkaError> {
        let client = self.client.clone();
        let lanes = client.context().lanes.clone();
        while !stop.is_cancelled() {
            beat.tick();
            let waiting = lock(&lanes).active.values().any(|lane| !lane.filling.is_empty());
            match client.poll(if waiting { Duration::ZERO } else { Duration::from_millis(20) }) {
                Some(Ok(message)) => self.take(&lanes, &message),
                Some(Err(KafkaError::PartitionEOF(partition))) => self.caught_up(&lanes, partition),
                Some(Err(error)) => report(&self.subscription, &error),
                None => self.flush_all(&lanes),
            }
            self.start_gained(&lanes);
            self.take_starts(&lanes);
        }
        finish(&client, &lanes, None);
        if let Err(error) = client.commit_consumer_state(CommitMode::Sync)
            && error.rdkafka_error_code() != Some(RDKafkaErrorCode::NoOffset)
        {
            tracing::warn!(consumer = self.subscription.name, error = %error, "the last commit failed; its records will be seen again");
        }
        client.unsubscribe();
        Ok(())
    }

    fn take(&self, lanes: &Mutex<Lanes>, message: &BorrowedMessage<'_>) {
        let full = {
            let mut lanes = lock(lanes);
            let Some(lane) = lanes.active.get_mut(&message.partition()) else { return };
            if lane.current == 0 {
                return;
            }
            lane.filling.push(message);
            let limits = &self.subscription;
            lane.filling.len() >= limits.max_batch_records || lane.filling.bytes() >= limits.max_batch_bytes
        };
        if full {
            self.hand_over_or_pause(lanes, message.partition());
        }
    }

    /// Waits a moment for room; a partition that stays full is paused, so that others go on.
    fn hand_over_or_pause(&self, lanes: &Mutex<Lanes>, partition: i32) {
        let until = Instant::now() + FULL_PATIENCE;
        loop {
            {
                let mut lanes = lock(lanes);
                let Some(lane) = lanes.active.get_mut(&partition) else { return };
                if lane.hand_over() {
                    return;
                }
                if Instant::now() >= until {
                    if !lane.paused {
                        lane.paused = self.set_paused(partition, true);
                        counter!("postrider_consumer_pauses_total", "consumer" => self.subscription.name).increment(1);
                    }
                    return;
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn flush_all(&self, lanes: &Mutex<Lanes>) {
        for lane in lock(lanes).active.values_mut() {
            lane.hand_over();
        }
    }

    fn caught_up(&self, lanes: &Mutex<Lanes>, partition: i32) {
        if let Some(lane) = lock(lanes).active.get_mut(&partition)
            && lane.current != 0
            && lane.hand_over()
        {
            // Where there is no room, records are waiting, and the end will be reported again after them.
            let _ = lane.work.try_send((lane.current, Work::CaughtUp));
        }
    }

    /// Starts a task for every partition that a callback gained.
    fn start_gained(&mut self, lanes: &Mutex<Lanes>) {
        let gained = std::mem::take(&mut lock(lanes).gained);
        for partition in gained {
            self.set_paused(partition, true);
            self.generation += 1;
            let (work, receiver) = mpsc::channel(1);
            let revoked = CancellationToken::new();
            let done = Arc::new(AtomicI64::new(-1));
            let worker = Worker {
                handler: self.handler.clone(),
                partition,
                generation: self.generation,
                work: receiver,
                starts: self.sender.clone(),
                done: done.clone(),
                look_up: self.look_up(partition),
                revoked: revoked.clone(),
                name: self.subscription.name,
            };
            let lane = Lane {
                work,
                current: 0,
                filling: Batch::default(),
                paused: true,
                done,
                stored: -1,
                revoked,
                task: self.runtime.spawn(worker.run()),
                generation: self.generation,
            };
            lock(lanes).active.insert(partition, lane);
        }
    }

    fn look_up(
        &self,
        partition: i32,
    ) -> impl Fn() -> std::pin::Pin<Box<dyn Future<Output = Result<Assignment, Failure>> + Send>> + Send + use<H> {
        let (client, broker, topic) = (self.client.clone(), self.broker.clone(), self.subscription.topic.clone());
        move || {
            let (client, broker, topic) = (client.clone(), broker.clone(), topic.clone());
            Box::pin(async move {
                let retry = |error: KafkaError| Failure::Retry(format!("Kafka: {error}"));
                let (low, high) = broker.watermarks(&topic, partition).await.map_err(retry)?;
                let committed = off_runtime(move || {
                    let mut wanted = TopicPartitionList::new();
                    wanted.add_partition(&topic, partition);
                    let found = client.committed_offsets(wanted, Duration::from_secs(5))?;
                    Ok(found.elements().first().and_then(|element| match element.offset() {
                        Offset::Offset(offset) => Some(offset),
                        _ => None,
                    }))
                });
                let committed = committed.await.map_err(retry)?;
                Ok(Assignment { partition, committed, low, high })
            })
        }
    }

    fn take_starts(&self, lanes: &Mutex<Lanes>) {
        while let Ok(start) = self.starts.try_recv() {
            self.start_reading(&mut lock(lanes), start);
        }
        self.retry_full(lanes);
        for (partition, lane) in &mut lock(lanes).active {
            lane.store(&self.client, *partition);
        }
    }

    fn start_reading(&self, lanes: &mut Lanes, start: Start) {
        let Some(lane) = lanes.active.get_mut(&start.partition) else { return };
        if start.generation >> 16 != lane.generation {
            return;
        }
        lane.filling = Batch::default();
        lane.current = 0;
        let offset = Offset::Offset(start.offset);
        match self.client.seek(&self.subscription.topic, start.partition, offset, Duration::from_secs(2)) {
            Ok(()) => {
                lane.current = start.generation;
                lane.paused = !self.set_paused(start.partition, false);
            }
            Err(error) => {
                // The fetcher is still starting; it is asked again.
                tracing::debug!(partition = start.partition, error = %error, "cannot seek yet");
                std::thread::sleep(Duration::from_millis(20));
                let _ = self.sender.send(start);
            }
        }
    }

    /// Hands over what a paused partition has, and resumes it when there is room again.
    fn retry_full(&self, lanes: &Mutex<Lanes>) {
        for (partition, lane) in &mut lock(lanes).active {
            if lane.paused && lane.current != 0 && lane.hand_over() {
                lane.paused = !self.set_paused(*partition, false);
            }
        }
    }

    /// Whether it worked.
    fn set_paused(&self, partition: i32, paused: bool) -> bool {
        let mut list = TopicPartitionList::new();
        list.add_partition(&self.subscription.topic, partition);
        let result = if paused { self.client.pause(&list) } else { self.client.resume(&list) };
        if let Err(error) = &result {
            tracing::debug!(partition, paused, error = %error, "cannot change a partition's flow");
        }
        result.is_ok()
    }
}

impl Lane {
    /// Whether the batch being filled is with the worker now, or there was none.
    fn hand_over(&mut self) -> bool {
        if self.filling.is_empty() {
            return true;
        }
        let Ok(slot) = self.work.try_reserve() else { return false };
        let batch = std::mem::take(&mut self.filling);
        histogram!("postrider_consumer_batch_records").record(batch.len() as f64);
        slot.send((self.current, Work::Batch(batch)));
        true
    }

    /// Stores what is done; the client commits it within a second, and at a rebalance.
    fn store<H: BatchHandler>(&mut self, client: &Client<H>, partition: i32) {
        let done = self.done.load(Ordering::Acquire);
        if done <= self.stored {
            return;
        }
        match client.store_offset(&client.context().topic, partition, done - 1) {
            Ok(()) => self.stored = done,
            Err(error) => tracing::debug!(partition, error = %error, "cannot store an offset"),
        }
    }
}

pub(super) fn lock(lanes: &Mutex<Lanes>) -> std::sync::MutexGuard<'_, Lanes> {
    lanes.lock().unwrap_or_else(PoisonError::into_inner)
}

fn report(subscription: &Subscription, error: &KafkaError) {
    tracing::debug!(consumer = subscription.name, error = %error, "the consumer reports a problem");
    std::thread::sleep(Duration::from_millis(20));
}

/// Lets the workers of these partitions, or all, finish what they have in hand, and stores it.
pub(super) fn finish<H: BatchHandler>(client: &Client<H>, shared: &Mutex<Lanes>, only: Option<&[i32]>) {
    let mut ending: HashMap<i32, Lane> = HashMap::new();
    let chosen: Vec<i32> = match only {
        Some(only) => only.to_vec(),
        None => lock(shared).active.keys().copied().collect(),
    };
    {
        let mut lanes = lock(shared);
        for &partition in &chosen {
            lanes.gained.retain(|gained| *gained != partition);
            if let Some(lane) = lanes.active.remove(&partition) {
                lane.revoked.cancel();
                ending.insert(partition, lane);
            }
        }
    }
    let deadline = Instant::now() + REVOKE_DEADLINE;
    while ending.values().any(|lane| !lane.task.is_finished()) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
    for (partition, mut lane) in ending {
        if !lane.task.is_finished() {
            // Its late effect is fenced by the room; its records are seen again by the next owner.
            tracing::warn!(partition, "a batch did not finish before its partition was taken away");
            lane.task.abort();
        }
        lane.store(client, partition);
    }
    chosen.iter().for_each(|&partition| client.context().handler.revoked(partition));
}
