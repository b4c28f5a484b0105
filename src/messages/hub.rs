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
    addresses::{Addresses, Place},
    channel,
    item::Notice,
    places::Places,
    slot::{Ending, Slot},
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
    pub places: Places,
    pub readers: Semaphore,
    /// Connections that are not closed yet.
    pub open: TaskTracker,
    /// Told of everybody who comes and goes.
    pub presence: Option<Presence>,
    addresses: Arc<Addresses>,
    key_prefix: String,
    missed_channel: Arc<str>,
    channels: Arc<Channels>,
    receivers: Mutex<HashMap<Arc<str>, Vec<Arc<Slot>>>>,
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
            places: Places::default(),
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
    pub async fn join(self: &Arc<Self>, receiver: &str, client: Option<IpAddr>) -> Result<Seat, Problem> {
        let place = self.addresses.enter(client)?;
        let (seat, subscribed) = {
            let mut receivers = self.receivers();
            let (known, slots) = receivers
                .get_key_value(receiver)
                .map_or_else(|| (Arc::from(receiver), 0), |(known, slots)| (known.clone(), slots.len()));
            self.check_room(slots)?;
            let slot = Arc::new(Slot::new(self.config.connection_buffer_bytes));
            receivers.entry(known.clone()).or_default().push(slot.clone());
            self.count.fetch_add(1, Relaxed);
            gauge!("postrider_messages_open_connections").increment(1);
            if let Some(presence) = &self.presence {
                presence.join(&known);
            }
            let subscribed = self.channels.add(self.channel(receiver));
            (Seat { hub: self.clone(), receiver: known, slot, _place: place }, subscribed)
        };
        let _ = timeout(SUBSCRIBE_PATIENCE, subscribed).await;
        Ok(seat)
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

    fn leave(&self, receiver: &Arc<str>, slot: &Arc<Slot>) {
        let mut receivers = self.receivers();
        let Some(slots) = receivers.get_mut(receiver) else { return };
        slots.retain(|other| !Arc::ptr_eq(other, slot));
        if slots.is_empty() {
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

    fn slots(&self) -> Vec<Arc<Slot>> {
        self.receivers().values().flatten().cloned().collect()
    }

    fn receivers(&self) -> MutexGuard<'_, HashMap<Arc<str>, Vec<Arc<Slot>>>> {
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
            for (receiver, lane, last) in self.store.heads(&names).await? {
                self.tell(&receiver, Notice::Head(lane, last));
            }
        }
        Ok(())
    }

    fn tell(&self, receiver: &str, notice: Notice) {
        let notice = Arc::new(notice);
        if let Some(slots) = self.receivers().get(receiver) {
            slots.iter().for_each(|slot| slot.push(&notice));
        }
    }

    /// Finds out where those are who come.
    pub async fn answer_forever(self: Arc<Self>) {
        self.places.answer_forever(&self.store).await;
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
            self.slots().iter().for_each(|slot| slot.tick(elapsed, ping, idle));
        }
    }

    /// Waits for the stop, then ends all connections, each at a time of its own, and waits for them.
    pub async fn close_at_stop(self: Arc<Self>, grace: Duration) {
        self.stop.cancelled().await;
        let window_ms = self.config.close_jitter_ms.min(u64::try_from(grace.as_millis() / 2).unwrap_or(u64::MAX));
        let mut order: Vec<(u64, Arc<Slot>)> =
            self.slots().into_iter().map(|slot| (fastrand::u64(0..=window_ms), slot)).collect();
        order.sort_by_key(|(at_ms, _)| *at_ms);
        let began = Instant::now();
        for (at_ms, slot) in order {
            tokio::time::sleep_until(began + Duration::from_millis(at_ms)).await;
            slot.end(Ending::Stop { retry_after_ms: fastrand::u64(100..=1_000) });
        }
        // Those whose handshake was under way when the others were counted.
        self.slots().iter().for_each(|slot| slot.end(Ending::Stop { retry_after_ms: fastrand::u64(100..=1_000) }));
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

/// A place among the open connections, until dropped.
pub struct Seat {
    pub hub: Arc<Hub>,
    pub receiver: Arc<str>,
    pub slot: Arc<Slot>,
    _place: Option<Place>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.hub.leave(&self.receiver, &self.slot);
    }
}
