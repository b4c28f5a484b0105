//! Redis pub/sub over one connection per process, for a set of channels that changes all the time.
//!
//! The set is compared with what is subscribed rather than passed on as a sequence of commands: so it is
//! bounded by the channels themselves, and whoever comes and goes cannot leave the wrong state behind.

use std::{
    collections::HashSet,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::StreamExt;
use redis::{ErrorKind, RedisError, Value, aio::PubSubSink};
use tokio::sync::{Notify, oneshot};

use super::redis::Config;

/// Channels of one command at most.
const CHUNK: usize = 500;
/// How long a connection may be silent before it is asked whether it is there.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Who is told.
pub trait Listener: Send + Sync {
    /// A message came. Called one after the other; must not block.
    fn message(&self, channel: &str, payload: &[u8]);

    /// All channels are subscribed, for the first time or again: what came in between is lost.
    fn restored(&self);

    /// The connection broke.
    fn broken(&self);
}

/// The channels that are wanted.
#[derive(Default)]
pub struct Channels {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    wanted: HashSet<Arc<str>>,
    /// Changed since the connection was told last.
    dirty: HashSet<Arc<str>>,
    /// Told when everything that is dirty now is done.
    waiting: Vec<oneshot::Sender<()>>,
    connected: bool,
}

impl Channels {
    /// Wants a channel. What is returned ends when it is subscribed, or at once where there is no
    /// connection; then `restored` will say so.
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
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the channels subscribed; never ends by itself.
    pub async fn run(self: Arc<Self>, config: Config, listener: Arc<impl Listener>) {
        loop {
            if let Err(error) = self.listen_once(&config, &*listener).await {
                tracing::debug!(error = %error, "Redis pub/sub is not connected");
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

    /// Makes what is subscribed what is wanted, as far as that has changed.
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
            // Who waited and has gone does not mind.
            let _ = done.send(());
        }
        Ok(())
    }
}

/// Ends when the connection no longer answers. One that just hangs breaks by itself only after minutes, and
/// no message is no sign of it.
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
