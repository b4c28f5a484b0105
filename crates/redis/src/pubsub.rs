//! Redis pub/sub over one connection per process, for a set of channels that changes constantly.
//!
//! The wanted set is compared with the subscribed set rather than passed on as a sequence of
//! commands. So the state is bounded by the channels themselves, and subscribers that come and go
//! cannot leave it wrong.

use std::{collections::HashSet, pin::pin, sync::Arc, time::Duration};

use futures_util::StreamExt;
use parking_lot::{Mutex, MutexGuard};
use redis::{ErrorKind, RedisError, Value, aio::PubSubSink};
use tokio::sync::{Notify, oneshot};

use super::Config;

/// Maximum number of channels in one command.
const CHUNK: usize = 500;
/// Pause between two pings of the connection.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Receiver of messages and of changes of the connection.
pub trait Listener: Send + Sync {
    /// Takes a message. Calls are sequential; must not block.
    fn message(&self, channel: &str, payload: &[u8]);

    /// Called when all channels are subscribed, for the first time or again; messages from in
    /// between are lost.
    fn restored(&self);

    /// Called when the connection breaks.
    fn broken(&self);
}

/// The wanted channels.
#[derive(Default)]
pub struct Channels {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    wanted: HashSet<Arc<str>>,
    /// Channels that changed since the last reconciliation.
    dirty: HashSet<Arc<str>>,
    /// Notified when all channels that are dirty now are reconciled.
    waiting: Vec<oneshot::Sender<()>>,
    connected: bool,
}

impl Channels {
    /// Adds a channel. The returned receiver resolves when the channel is subscribed, or at once if
    /// there is no connection; the listener's `restored` is called in that case.
    pub fn add(&self, channel: Arc<str>) -> oneshot::Receiver<()> {
        let (done, subscribed) = oneshot::channel();
        let mut state = self.state();
        if state.connected {
            state.waiting.push(done);
        }
        state.dirty.insert(channel.clone());
        state.wanted.insert(channel);
        drop(state);
        self.changed.notify_one();
        subscribed
    }

    pub fn remove(&self, channel: &Arc<str>) {
        let mut state = self.state();
        state.wanted.remove(channel);
        state.dirty.insert(channel.clone());
        drop(state);
        self.changed.notify_one();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Keeps the channels subscribed; never returns.
    pub async fn run(self: Arc<Self>, config: Config, listener: Arc<impl Listener>) {
        loop {
            if let Err(error) = self.listen_once(&config, &*listener).await {
                tracing::debug!(error = %error, "redis pub/sub not connected, reconnecting");
            }
            self.disconnected();
            listener.broken();
            tokio::time::sleep(Duration::from_millis(200 + fastrand::u64(0..200))).await;
        }
    }

    fn disconnected(&self) {
        let mut state = self.state();
        state.connected = false;
        state.waiting.clear();
    }

    async fn listen_once(&self, config: &Config, listener: &impl Listener) -> Result<(), RedisError> {
        let client = redis::Client::open(config.first_url()?)?;
        let patience = Duration::from_millis(config.connect_timeout_ms);
        let (mut sink, mut messages) = in_time(patience, client.get_async_pubsub()).await?.split();
        let mut subscribed = HashSet::new();
        {
            let mut state = self.state();
            state.connected = true;
            state.dirty = state.wanted.clone();
        }
        self.reconcile(&mut sink, &mut subscribed, patience).await?;
        listener.restored();
        let mut hung = pin!(hang(sink.clone(), patience));
        loop {
            tokio::select! {
                message = messages.next() => match message {
                    Some(message) => listener.message(message.get_channel_name(), message.get_payload_bytes()),
                    None => return Ok(()),
                },
                () = self.changed.notified() => self.reconcile(&mut sink, &mut subscribed, patience).await?,
                error = &mut hung => return Err(error),
            }
        }
    }

    /// Subscribes and unsubscribes the channels that have changed.
    async fn reconcile(
        &self,
        sink: &mut PubSubSink,
        subscribed: &mut HashSet<Arc<str>>,
        patience: Duration,
    ) -> Result<(), RedisError> {
        let (more, less, waiting) = {
            let mut state = self.state();
            let dirty = std::mem::take(&mut state.dirty);
            let (more, less): (Vec<_>, Vec<_>) = dirty.into_iter().partition(|channel| state.wanted.contains(channel));
            (more, less, std::mem::take(&mut state.waiting))
        };
        for channels in more.chunks(CHUNK) {
            let names: Vec<&str> = channels.iter().map(|channel| &**channel).collect();
            in_time(patience, sink.subscribe(&names[..])).await?;
        }
        let less: Vec<_> = less.into_iter().filter(|channel| subscribed.contains(channel)).collect();
        for channels in less.chunks(CHUNK) {
            let names: Vec<&str> = channels.iter().map(|channel| &**channel).collect();
            in_time(patience, sink.unsubscribe(&names[..])).await?;
        }
        less.iter().for_each(|channel| {
            subscribed.remove(channel);
        });
        subscribed.extend(more);
        for done in waiting {
            // A receiver that was dropped does not matter.
            let _ = done.send(());
        }
        Ok(())
    }
}

/// Returns when the connection no longer answers. A connection that hangs breaks by itself only
/// after minutes, and the absence of messages is no sign of it.
pub(super) async fn hang(mut sink: PubSubSink, patience: Duration) -> RedisError {
    loop {
        tokio::time::sleep(HEARTBEAT).await;
        if let Err(error) = in_time(patience, sink.ping::<Value>()).await {
            return error;
        }
    }
}

async fn in_time<T>(patience: Duration, asked: impl Future<Output = Result<T, RedisError>>) -> Result<T, RedisError> {
    let too_slow = (ErrorKind::Io, "no answer within `redis.connect_timeout_ms`");
    tokio::time::timeout(patience, asked).await.map_err(|_| RedisError::from(too_slow))?
}
