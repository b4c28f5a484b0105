//! All open connections of a process, by receiver: what comes by Redis goes to those whose it is, time
//! goes by for all of them at once, and now and then it is looked whether anybody has missed something.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use metrics::{counter, gauge};
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
use crate::platform::{
    http::{Code, Problem},
    pubsub::{Channels, Listener},
    query::Error,
};

/// Receivers that are asked for by one query.
const CHUNK: usize = 500;
/// Readings of missed messages at the same time; the pool has other things to do as well.
const READERS: usize = 6;
/// For a new connection's channel; without it, the connection is told later what it missed.
const SUBSCRIBE_PATIENCE: Duration = Duration::from_secs(1);
/// How often is looked while Redis announces nothing.
const WITHOUT_REDIS: Duration = Duration::from_millis(500);
/// Longest pause before it is looked for messages that were not announced, so that not all processes look at once.
const MISSED_JITTER_MS: u64 = 200;

pub struct Hub {
    pub config: Config,
    pub store: Store,
    pub positions: PositionLookup,
    pub readers: Semaphore,
    /// Connections that are not closed yet.
    pub open: TaskTracker,
    /// Told of everybody who comes and goes.
    pub presence: Option<Presence>,
    addresses: Arc<Addresses>,
    key_prefix: String,
    missed_channel: Arc<str>,
    channels: Arc<Channels>,
    receivers: Mutex<HashMap<Arc<str>, Vec<Arc<SendQueue>>>>,
    count: AtomicUsize,
    connected: AtomicBool,
    /// Redis is back, or gone, or announcements are missing.
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

    /// Adds a connection of a receiver. When this returns, everything that is stored from now on reaches it.
    pub async fn join(self: &Arc<Self>, receiver: &str, client: Option<IpAddr>) -> Result<Subscription, Problem> {
        let permit = self.addresses.enter(client)?;
        let (subscription, subscribed) = {
            let mut receivers = self.receivers();
            let (known, queues) = receivers
                .get_key_value(receiver)
                .map_or_else(|| (Arc::from(receiver), 0), |(known, queues)| (known.clone(), queues.len()));
            self.check_room(queues)?;
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
        let _ = timeout(SUBSCRIBE_PATIENCE, subscribed).await;
        Ok(subscription)
    }

    fn check_room(&self, of_receiver: usize) -> Result<(), Problem> {
        let Config { max_connections, max_connections_per_receiver, .. } = self.config;
        if self.stop.is_cancelled() {
            return Err(Problem::new(Code::TooManyStreams, "this process is stopping"));
        }
        if self.count.load(Relaxed) >= max_connections {
            return Err(Problem::new(Code::TooManyStreams, format!("{max_connections} connections are open")));
        }
        if of_receiver >= max_connections_per_receiver {
            let detail = format!("this receiver has {of_receiver} connections here");
            return Err(Problem::new(Code::TooManyConnections, detail));
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
            // Under the lock, so that whoever joins next comes after it.
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
        self.receivers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks for what nobody was told: seldom, unless Redis is away or has just come back.
    pub async fn sweep_forever(self: Arc<Self>) {
        loop {
            let connected = self.connected.load(Relaxed);
            let pause = if connected { self.config.sweep_interval() } else { WITHOUT_REDIS };
            if timeout(pause, self.turned.notified()).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(fastrand::u64(0..=MISSED_JITTER_MS))).await;
            }
            while let Err(error) = self.sweep().await {
                tracing::debug!(error = %error, "cannot look for missed messages");
                tokio::time::sleep(WITHOUT_REDIS.mul_f64(1.0 + fastrand::f64())).await;
            }
        }
    }

    async fn sweep(&self) -> Result<(), Error> {
        let receivers: Vec<Arc<str>> = self.receivers().keys().cloned().collect();
        for chunk in receivers.chunks(CHUNK) {
            let names: Vec<&str> = chunk.iter().map(|receiver| &**receiver).collect();
            for (receiver, partition_id, last) in self.store.heads(&names).await? {
                self.tell(&receiver, Notice::Head(partition_id, last));
            }
        }
        Ok(())
    }

    fn tell(&self, receiver: &str, notice: Notice) {
        let notice = Arc::new(notice);
        if let Some(queues) = self.receivers().get(receiver) {
            queues.iter().for_each(|queue| queue.push(&notice));
        }
    }

    /// Finds out where those are who come.
    pub async fn answer_forever(self: Arc<Self>) {
        self.positions.answer_forever(&self.store).await;
    }

    /// Lets time go by for all connections.
    pub async fn tick_forever(self: Arc<Self>) {
        let ping = self.config.ping_interval();
        // A client must have had the chance to answer.
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

    /// Waits for the stop, then ends all connections, each at a time of its own, and waits for them.
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
        // Those whose handshake was under way when the others were counted.
        self.queues().iter().for_each(|queue| queue.end(Ending::Stop { retry_after_ms: fastrand::u64(100..=1_000) }));
        self.open.close();
        if timeout(grace.saturating_sub(began.elapsed()), self.open.wait()).await.is_err() {
            tracing::warn!(connections = self.open.len(), "connections did not take their close in time");
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
            Some(notice) => self.tell(receiver, notice),
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

/// An open connection's registration with the hub, until dropped.
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
