//! Registry of a process's open connections by receiver: passes notices from Redis to the send
//! queues, drives ping and idle timers, and regularly checks for missed messages.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use metrics::{counter, gauge};
use parking_lot::{Mutex, MutexGuard};
use postrider_http::{Code, Problem};
use postrider_postgres::query::Error;
use postrider_redis::pubsub::{Channels, Listener};
use tokio::{
    sync::{Notify, Semaphore},
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Config, Presence,
    addresses::{AddressPermit, Addresses},
    channel,
    item::Notice,
    position_lookup::PositionLookup,
    send_queue::{Ending, SendQueue},
    store::Store,
};
use crate::codes;

/// Maximum number of receivers per query.
const CHUNK: usize = 500;
/// Maximum number of concurrent catch-up reads, because other features share the pool.
const READERS: usize = 6;
/// Maximum wait for the Redis subscription of a new connection. After it, the sweep delivers missed
/// messages.
const SUBSCRIBE_TIMEOUT: Duration = Duration::from_secs(1);
/// Sweep interval while Redis is unavailable.
const WITHOUT_REDIS: Duration = Duration::from_millis(500);
/// Maximum random delay before a sweep for missed messages, in milliseconds, so that not all
/// processes query at once.
const MISSED_JITTER_MS: u64 = 200;

pub struct Hub {
    pub config: Config,
    pub store: Store,
    pub positions: PositionLookup,
    pub readers: Semaphore,
    /// Connections that are not closed yet.
    pub open: TaskTracker,
    /// Notified of every connection that opens or closes.
    pub presence: Option<Presence>,
    addresses: Arc<Addresses>,
    key_prefix: String,
    missed_channel: Arc<str>,
    channels: Arc<Channels>,
    receivers: Mutex<HashMap<Arc<str>, Vec<Arc<SendQueue>>>>,
    count: AtomicUsize,
    connected: AtomicBool,
    /// Notified when Redis connects or disconnects, or when notices are missing.
    turned: Notify,
    stop: CancellationToken,
}

impl Hub {
    pub fn new(
        config: Config,
        store: Store,
        key_prefix: String,
        presence: Option<Presence>,
        stop: CancellationToken,
    ) -> Arc<Self> {
        let channels: Arc<Channels> = Arc::default();
        let missed_channel: Arc<str> = super::missed_channel(&key_prefix).into();
        drop(channels.add(missed_channel.clone()));
        Arc::new(Self {
            addresses: Addresses::new(config.max_connections_per_address),
            config,
            store,
            positions: PositionLookup::default(),
            readers: Semaphore::new(READERS),
            open: TaskTracker::new(),
            presence,
            key_prefix,
            missed_channel,
            channels,
            receivers: Mutex::default(),
            count: AtomicUsize::new(0),
            connected: AtomicBool::new(false),
            turned: Notify::new(),
            stop,
        })
    }

    pub fn channels(&self) -> Arc<Channels> {
        self.channels.clone()
    }

    /// Registers a connection of a receiver. Messages stored after this returns reach the
    /// connection.
    pub async fn join(self: &Arc<Self>, receiver: &str, client: Option<IpAddr>) -> Result<Subscription, Problem> {
        let permit = self.addresses.enter(client)?;
        let (subscription, subscribed) = {
            let mut receivers = self.receivers();
            let (known, queues) = receivers
                .get_key_value(receiver)
                .map_or_else(|| (Arc::from(receiver), 0), |(known, queues)| (known.clone(), queues.len()));
            self.check_limits(queues)?;
            let queue = Arc::new(SendQueue::new(self.config.connection_buffer_bytes));
            receivers.entry(known.clone()).or_default().push(queue.clone());
            self.count.fetch_add(1, Relaxed);
            gauge!("postrider_messages_open_connections").increment(1);
            if let Some(presence) = &self.presence {
                presence.join(&known);
            }
            let subscribed = self.channels.add(self.channel(receiver));
            (Subscription { hub: self.clone(), receiver: known, queue, _permit: permit }, subscribed)
        };
        let _ = timeout(SUBSCRIBE_TIMEOUT, subscribed).await;
        Ok(subscription)
    }

    fn check_limits(&self, of_receiver: usize) -> Result<(), Problem> {
        let Config { max_connections, max_connections_per_receiver, .. } = self.config;
        if self.stop.is_cancelled() {
            return Err(Problem::new(Code::TOO_MANY_STREAMS, "this process is stopping"));
        }
        if self.count.load(Relaxed) >= max_connections {
            return Err(Problem::new(
                Code::TOO_MANY_STREAMS,
                format!("the limit of {max_connections} connections per process is reached; retry later"),
            ));
        }
        if of_receiver >= max_connections_per_receiver {
            let detail = format!(
                "this receiver has {of_receiver} connections here, the limit is {max_connections_per_receiver}"
            );
            return Err(Problem::new(codes::TOO_MANY_CONNECTIONS, detail));
        }
        Ok(())
    }

    fn channel(&self, receiver: &str) -> Arc<str> {
        channel(&self.key_prefix, receiver).into()
    }

    fn leave(&self, receiver: &Arc<str>, queue: &Arc<SendQueue>) {
        let mut receivers = self.receivers();
        let Some(queues) = receivers.get_mut(receiver) else { return };
        queues.retain(|other| !Arc::ptr_eq(other, queue));
        if queues.is_empty() {
            receivers.remove(receiver);
            // Under the lock, so that a concurrent join subscribes again after it.
            self.channels.remove(&self.channel(receiver));
        }
        self.count.fetch_sub(1, Relaxed);
        gauge!("postrider_messages_open_connections").decrement(1);
        if let Some(presence) = &self.presence {
            presence.leave(receiver);
        }
    }

    fn queues(&self) -> Vec<Arc<SendQueue>> {
        self.receivers().values().flatten().cloned().collect()
    }

    fn receivers(&self) -> MutexGuard<'_, HashMap<Arc<str>, Vec<Arc<SendQueue>>>> {
        self.receivers.lock()
    }

    /// Looks for messages that were not announced: at the sweep interval, more often while Redis is
    /// unavailable, and at once when it reconnects.
    pub async fn sweep_forever(self: Arc<Self>) {
        loop {
            let connected = self.connected.load(Relaxed);
            let pause = if connected { self.config.sweep_interval() } else { WITHOUT_REDIS };
            if timeout(pause, self.turned.notified()).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(fastrand::u64(0..=MISSED_JITTER_MS))).await;
            }
            while let Err(error) = self.sweep().await {
                tracing::debug!(error = %error, "sweep for missed messages failed");
                tokio::time::sleep(WITHOUT_REDIS.mul_f64(1.0 + fastrand::f64())).await;
            }
        }
    }

    async fn sweep(&self) -> Result<(), Error> {
        let receivers: Vec<Arc<str>> = self.receivers().keys().cloned().collect();
        for chunk in receivers.chunks(CHUNK) {
            let names: Vec<&str> = chunk.iter().map(|receiver| &**receiver).collect();
            for (receiver, partition_id, last) in self.store.heads(&names).await? {
                self.notify(&receiver, Notice::Head(partition_id, last));
            }
        }
        Ok(())
    }

    fn notify(&self, receiver: &str, notice: Notice) {
        let notice = Arc::new(notice);
        if let Some(queues) = self.receivers().get(receiver) {
            queues.iter().for_each(|queue| queue.push(&notice));
        }
    }

    /// Answers position lookups of new connections; runs forever.
    pub async fn answer_forever(self: Arc<Self>) {
        self.positions.answer_forever(&self.store).await;
    }

    /// Drives the ping and idle timers of all connections; runs forever.
    pub async fn tick_forever(self: Arc<Self>) {
        let ping = self.config.ping_interval();
        // At least two ping intervals, so that a client has time to answer.
        let idle = self.config.idle_timeout().max(2 * ping);
        let every = (ping.min(idle) / 8).clamp(Duration::from_millis(10), Duration::from_secs(1));
        let mut before = Instant::now();
        loop {
            tokio::time::sleep(every).await;
            let elapsed = before.elapsed();
            before += elapsed;
            self.queues().iter().for_each(|queue| queue.tick(elapsed, ping, idle));
        }
    }

    /// Waits for the stop, ends all connections at random times within the window, and waits for
    /// them.
    pub async fn close_at_stop(self: Arc<Self>, grace: Duration) {
        self.stop.cancelled().await;
        let window_ms = self.config.close_jitter_ms.min(u64::try_from(grace.as_millis() / 2).unwrap_or(u64::MAX));
        let mut order: Vec<(u64, Arc<SendQueue>)> =
            self.queues().into_iter().map(|queue| (fastrand::u64(0..=window_ms), queue)).collect();
        order.sort_by_key(|(at_ms, _)| *at_ms);
        let began = Instant::now();
        for (at_ms, queue) in order {
            tokio::time::sleep_until(began + Duration::from_millis(at_ms)).await;
            queue.end(Ending::Stop { retry_after_ms: fastrand::u64(100..=1_000) });
        }
        // Also ends connections whose handshake was in progress.
        self.queues().iter().for_each(|queue| queue.end(Ending::Stop { retry_after_ms: fastrand::u64(100..=1_000) }));
        self.open.close();
        if timeout(grace.saturating_sub(began.elapsed()), self.open.wait()).await.is_err() {
            tracing::warn!(connections = self.open.len(), "connections did not close in time");
        }
    }
}

impl Listener for Hub {
    fn message(&self, channel: &str, payload: &[u8]) {
        if *channel == *self.missed_channel {
            return self.turned.notify_one();
        }
        let Some(receiver) = channel.strip_prefix(&*super::channel(&self.key_prefix, "")) else { return };
        match Notice::decode(payload) {
            Some(notice) => self.notify(receiver, notice),
            None => counter!("postrider_messages_unreadable_notices_total").increment(1),
        }
    }

    fn restored(&self) {
        self.connected.store(true, Relaxed);
        self.turned.notify_one();
    }

    fn broken(&self) {
        self.connected.store(false, Relaxed);
        self.turned.notify_one();
    }
}

/// Registration of an open connection with the hub; ends when dropped.
pub struct Subscription {
    pub hub: Arc<Hub>,
    pub receiver: Arc<str>,
    pub queue: Arc<SendQueue>,
    _permit: Option<AddressPermit>,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.hub.leave(&self.receiver, &self.queue);
    }
}
