//! Polling thread of a consumer: reads records into batches, hands them to the partitions' work,
//! and stores the offsets of finished records.
//!
//! The buffers belong to this thread alone. The partitions' work is shared with the callbacks of
//! the client library, which run on this thread, inside `poll`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use metrics::{counter, gauge};
use postrider_health::Beat;
use rdkafka::{
    Message, Offset, TopicPartitionList,
    consumer::{CommitMode, Consumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::BorrowedMessage,
};
use tokio_util::sync::CancellationToken;

use super::{
    Subscription, commit_reset,
    fetch_buffer::FetchBuffer,
    fetch_watchdog::{self, FetchWatchdog},
    membership::{Client, Owned, OwnedPartition},
    ownership_proof,
    report::Report,
    stall::{Progress, Watchdog},
    work::{Opening, Shape, Start},
};
use crate::{
    Broker,
    client_watchdog::{ClientWatchdog, Stuck},
};

/// Time that a full partition may delay the others before it is paused.
const PAUSE_FULL_AFTER: Duration = Duration::from_millis(50);
/// Timeout of a poll. Retries that are due may be delayed by this time.
const POLL_TIMEOUT: Duration = Duration::from_millis(20);
/// Time that a batch may fill while records keep arriving.
const FILL_TIME: Duration = Duration::from_millis(5);
/// Maximum number of polls between two rounds of all other work, while records keep arriving.
const MAX_POLLS_PER_ROUND: usize = 512;

/// Counts ownerships of partitions over all consumers and clients; 0 stands for none.
static GENERATIONS: AtomicU64 = AtomicU64::new(1);

/// Reason why polling ended.
pub(super) enum End {
    /// The consumer was stopped: finished work is committed, and the member has left the group.
    Left,
    /// The client is stuck although Kafka answers. Its partitions have been released.
    Stuck(Stuck),
}

pub(super) struct Poller {
    pub client: Arc<Client>,
    pub subscription: Subscription,
    pub shape: Arc<dyn Shape>,
    pub broker: Broker,
    pub progress: Arc<Progress>,
    pub report: Report,
    pub watchdog: Watchdog,
    starts: mpsc::Receiver<Start>,
    sender: mpsc::Sender<Start>,
    /// By partition: the batch being filled.
    buffers: Vec<FetchBuffer>,
    losses: u64,
    last_upkeep: Instant,
    last_proof: Instant,
    last_flush: Instant,
}

impl Poller {
    pub fn new(
        client: Arc<Client>,
        subscription: Subscription,
        shape: Arc<dyn Shape>,
        broker: Broker,
        progress: Arc<Progress>,
        report: Report,
        watchdog: Watchdog,
    ) -> Self {
        let (sender, starts) = mpsc::channel();
        let last_upkeep = Instant::now();
        let (buffers, losses) = (Vec::new(), 0);
        Self {
            client,
            subscription,
            shape,
            broker,
            progress,
            report,
            watchdog,
            starts,
            sender,
            buffers,
            losses,
            last_upkeep,
            last_proof: last_upkeep,
            last_flush: last_upkeep,
        }
    }

    /// Polls until the stop, then finishes, commits and leaves the group; or polls until the client
    /// is stuck.
    pub fn poll_until(
        mut self,
        stop: &CancellationToken,
        beat: &Beat,
        clients: &ClientWatchdog,
    ) -> Result<End, KafkaError> {
        let client = self.client.clone();
        while !stop.is_cancelled() {
            let (mut wait, mut drained) = (POLL_TIMEOUT, false);
            for _ in 0..MAX_POLLS_PER_ROUND {
                match client.poll(wait) {
                    Some(Ok(message)) => self.take(&message),
                    Some(Err(KafkaError::PartitionEOF(partition))) => self.caught_up(partition),
                    Some(Err(error)) => self.fail_if_fatal(&error)?,
                    None => {
                        drained = true;
                        break;
                    }
                }
                wait = Duration::ZERO;
            }
            self.drop_lost();
            self.flush(drained);
            self.open_gained();
            self.take_starts();
            self.run_upkeep();
            self.client.context().assert_at_work()?;
            self.shape.tick();
            if self.is_alive() {
                beat.tick();
            }
            let connectivity = &client.context().connectivity;
            let stuck = clients.look(connectivity, |reported| self.broker.up_since(reported));
            let excluded = || client.context().excluded.load(Ordering::Relaxed);
            if let Some(stuck) = stuck.or_else(|| excluded().then_some(Stuck::Excluded)) {
                client.context().let_go_of_all(&client);
                return Ok(End::Stuck(stuck));
            }
        }
        self.leave();
        Ok(End::Left)
    }

    fn take(&mut self, message: &BorrowedMessage<'_>) {
        self.drop_lost();
        let Some(buffer) = self.buffers.get_mut(message.partition() as usize) else { return };
        if buffer.start == 0 {
            return;
        }
        buffer.fetch_watchdog = None;
        buffer.batch.push(message);
        let limits = &self.subscription;
        if buffer.batch.len() >= limits.max_batch_records || buffer.batch.bytes() >= limits.max_batch_bytes {
            self.hand_over_or_pause(message.partition());
        }
    }

    /// Drops the buffers of partitions that a callback released.
    fn drop_lost(&mut self) {
        let losses = self.client.context().losses.load(Ordering::Relaxed);
        if losses == self.losses {
            return;
        }
        self.losses = losses;
        let owned = self.client.context().owned();
        for (partition, buffer) in self.buffers.iter_mut().enumerate() {
            let held = owned.partitions.get(&(partition as i32));
            if held.is_none_or(|held| held.generation != buffer.generation) {
                *buffer = FetchBuffer::default();
            }
        }
    }

    /// Hands over the buffer of a partition, waiting up to [`PAUSE_FULL_AFTER`] for capacity. A
    /// partition that stays full is paused, so that others continue.
    fn hand_over_or_pause(&mut self, partition: i32) {
        let until = Instant::now() + PAUSE_FULL_AFTER;
        let client = self.client.clone();
        loop {
            {
                let mut owned = client.context().owned();
                let Some(held) = owned.partitions.get_mut(&partition) else { return };
                if self.buffers[partition as usize].hand_over(held) || held.paused {
                    return;
                }
                if Instant::now() >= until {
                    held.paused = self.set_paused(partition, true);
                    counter!("postrider_consumer_pauses_total", "consumer" => self.subscription.name).increment(1);
                    self.report.full(partition, &held.work.span());
                    return;
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Hands over buffered records, resumes partitions that have capacity again, and stores commit
    /// points. While records keep arriving, batches may fill for up to [`FILL_TIME`].
    fn flush(&mut self, drained: bool) {
        let client = self.client.clone();
        let all = drained || self.last_flush.elapsed() > FILL_TIME;
        if all {
            self.last_flush = Instant::now();
        }
        let mut owned = client.context().owned();
        for (&partition, held) in &mut owned.partitions {
            if held.start != 0 && (all || held.paused) {
                let handed_over = self.buffers[partition as usize].hand_over(held);
                if handed_over && held.paused && held.work.has_room() {
                    held.paused = !self.set_paused(partition, false);
                }
            }
            let commit_point = held.work.commit_point();
            client.context().store(&client, partition, held, commit_point);
        }
    }

    fn caught_up(&mut self, partition: i32) {
        self.drop_lost();
        let client = self.client.clone();
        let mut owned = client.context().owned();
        if let Some(buffer) = self.buffers.get_mut(partition as usize) {
            buffer.fetch_watchdog = None;
        }
        if let Some(held) = owned.partitions.get_mut(&partition)
            && held.start != 0
            && self.buffers[partition as usize].hand_over(held)
        {
            held.work.caught_up();
        }
    }

    /// Opens every partition that a callback gained.
    fn open_gained(&mut self) {
        let gained = std::mem::take(&mut self.client.context().owned().gained);
        for partition in gained {
            self.set_paused(partition, true);
            let generation = GENERATIONS.fetch_add(1, Ordering::Relaxed);
            if self.buffers.len() <= partition as usize {
                self.buffers.resize_with(partition as usize + 1, FetchBuffer::default);
            }
            self.buffers[partition as usize] = FetchBuffer { generation, ..FetchBuffer::default() };
            let opening = Opening { partition, generation, starts: self.sender.clone() };
            let work = self.shape.open(opening);
            let held = OwnedPartition {
                work,
                generation,
                start: 0,
                paused: true,
                stored: -1,
                committed: None,
                proved: None,
                commit_is_beyond_end: false,
            };
            self.client.context().owned().partitions.insert(partition, held);
        }
    }

    fn take_starts(&mut self) {
        while let Ok(start) = self.starts.try_recv() {
            let client = self.client.clone();
            let retry = self.begin(&mut client.context().owned(), start);
            if retry {
                // The fetcher is still starting; the request is repeated.
                std::thread::sleep(Duration::from_millis(20));
                let _ = self.sender.send(start);
                return;
            }
        }
    }

    /// Starts reading a partition at the requested offset. Returns whether the request has to be
    /// repeated.
    fn begin(&mut self, owned: &mut Owned, start: Start) -> bool {
        let Some(held) = owned.partitions.get_mut(&start.partition) else { return false };
        if start.generation != held.generation {
            return false;
        }
        let buffer = &mut self.buffers[start.partition as usize];
        // Of earlier attempts at this start.
        let waiting = buffer.fetch_watchdog.take().filter(|_| buffer.starting == Some(start.start));
        *buffer = FetchBuffer { generation: held.generation, starting: Some(start.start), ..FetchBuffer::default() };
        held.start = 0;
        if let Some(offset) = start.offset
            && let Err(error) = self.client.seek(
                &self.subscription.topic,
                start.partition,
                Offset::Offset(offset),
                Duration::from_secs(2),
            )
        {
            tracing::debug!(partition = start.partition, error = %error, "cannot seek yet, retrying");
            let now = Instant::now();
            let watchdog =
                buffer.fetch_watchdog.insert(waiting.unwrap_or_else(|| FetchWatchdog::new(start.offset, now)));
            if !watchdog.is_due(now) || !self.broker.is_up() {
                return true;
            }
            // The library waits for something that does not come, such as the group's commit.
            if !watchdog.assign_again(&self.client, &self.subscription, start.partition, now) {
                return true;
            }
        }
        (held.start, buffer.start) = (start.start, start.start);
        buffer.fetch_watchdog = Some(FetchWatchdog::new(start.offset, Instant::now()));
        held.work.begun(start.start);
        held.paused = !self.set_paused(start.partition, false);
        false
    }

    /// Runs once a second: reports spans and metrics, and restarts stalled fetches.
    fn run_upkeep(&mut self) {
        if self.last_upkeep.elapsed() < Duration::from_secs(1) {
            return;
        }
        self.last_upkeep = Instant::now();
        let client = self.client.clone();
        if self.broker.is_up() {
            fetch_watchdog::restart_stalled(&mut self.buffers, &client, &self.subscription);
        }
        let mut owned = client.context().owned();
        self.report.update(
            owned
                .partitions
                .iter_mut()
                .map(|(&partition, held)| (partition, held.stored, held.paused, held.work.span())),
        );
        commit_reset::move_back(&client, &self.subscription.topic, &mut owned);
        if self.last_proof.elapsed() >= ownership_proof::PROOF_INTERVAL {
            self.last_proof = Instant::now();
            ownership_proof::prove(&client, &self.subscription.topic, &mut owned);
        }
        let partitions = owned.partitions.len();
        gauge!("postrider_consumer_partitions", "consumer" => self.subscription.name).set(partitions as f64);
    }

    /// Returns whether waiting work is being processed. Failing handlers count as alive, whatever
    /// the state of their dependencies.
    fn is_alive(&mut self) -> bool {
        let waiting = {
            let owned = self.client.context().owned();
            let unfetched = self.client.context().unfetched.load(Ordering::Relaxed) > 0;
            (unfetched && self.broker.is_up()) || owned.partitions.values().any(|held| held.work.is_running())
        };
        !self.watchdog.is_stuck(&self.progress, waiting, Instant::now())
    }

    /// Pauses or resumes a partition. Returns whether that succeeded.
    fn set_paused(&self, partition: i32, paused: bool) -> bool {
        let mut list = TopicPartitionList::new();
        list.add_partition(&self.subscription.topic, partition);
        let result = if paused { self.client.pause(&list) } else { self.client.resume(&list) };
        if let Err(error) = &result {
            tracing::debug!(partition, paused, error = %error, "cannot pause or resume partition");
        }
        result.is_ok()
    }

    /// Returns an error if the client has failed fatally; otherwise logs the error and waits
    /// briefly.
    fn fail_if_fatal(&self, error: &KafkaError) -> Result<(), KafkaError> {
        tracing::debug!(consumer = self.subscription.name, error = %error, "consumer client reported an error");
        if let Some((code, reason)) = self.client.client().fatal_error() {
            tracing::error!(consumer = self.subscription.name, %code, reason, "consumer failed fatally");
            return Err(KafkaError::MessageConsumptionFatal(code));
        }
        std::thread::sleep(Duration::from_millis(20));
        Ok(())
    }

    fn leave(self) {
        self.client.context().let_go_of_all(&self.client);
        if let Err(error) = self.client.commit_consumer_state(CommitMode::Sync)
            && error.rdkafka_error_code() != Some(RDKafkaErrorCode::NoOffset)
        {
            let consumer = self.subscription.name;
            tracing::warn!(consumer, error = %error, "last commit failed; the next owner processes its records again");
        }
        self.client.unsubscribe();
    }
}
