//! The consumer runtime: records in order, effects before commits, one slow thing delays only itself.
//!
//! Two shapes cover every room. A [`BatchHandler`] gets the records of a partition in order, a
//! batch at a time: for projections, whose effect is one set-based write. A [`KeyedHandler`] gets
//! one record at a time, those of a key one after the other and different keys side by side: for
//! effects that take time each, such as requests to other people's endpoints.
//!
//! What holds for both:
//!
//! - The commit point of a partition is its lowest unfinished record. It is committed within a
//!   second, at every rebalance and at the stop, and never passes an unfinished effect.
//! - Between the commit point and what was read last lies the span. It is bounded in records and
//!   bytes; where it is full, the partition pauses, the others go on, and the log, the metrics and
//!   `/consumers` on the management port name the record that holds it.
//! - A dependency that is down holds records, for as long as it takes, with backoff. Records that
//!   can never have their effect go to the dead letters, and count as finished when they are there.
//! - A partition that is taken away finishes what it has in hand within five seconds, or drops it;
//!   either way what is done is committed before the next owner begins, and nothing is
//!   committed for it later.
//! - Records that wait and no handler that finishes anything, well or badly, for
//!   `kafka.consumer.stall_timeout_ms` make the process not live.
//!
//! # A room in forty lines
//!
//! ```no_run
//! use std::{sync::Arc, time::Duration};
//! use postrider::platform::kafka::{
//!     dead_letter::{DeadLetters, Reason},
//!     consumer::{Delivery, KeyedHandler, Keyed, Consumers, Outcome, Span, Subscription},
//! };
//!
//! /// Greets whoever a record names.
//! struct Greeter;
//!
//! impl KeyedHandler for Greeter {
//!     async fn handle(&self, delivery: &Delivery) -> Outcome {
//!         let Some(value) = delivery.record().value() else { return Outcome::Done };
//!         let Ok(name) = std::str::from_utf8(value) else {
//!             return Outcome::DeadLetter(Reason { class: "not_text", message: "the value is not UTF-8".into() });
//!         };
//!         match greet(name).await {
//!             Ok(()) => Outcome::Done,
//!             Err(problem) if delivery.attempt() < 4 => {
//!                 Outcome::RetryAfter(Duration::from_secs(1), Reason { class: "deaf", message: problem })
//!             }
//!             Err(problem) => Outcome::DeadLetter(Reason { class: "deaf", message: problem }),
//!         }
//!     }
//! }
//! # async fn greet(_name: &str) -> Result<(), String> { Ok(()) }
//!
//! # async fn start(consumers: Consumers, dead_letters: DeadLetters) -> Result<(), rdkafka::error::KafkaError> {
//! let subscription = Subscription {
//!     name: "greeter",
//!     topic: "names".into(),
//!     group: "greeters".into(),
//!     max_batch_records: 500,
//!     max_batch_bytes: 256 << 10,
//!     dead_letters,
//! };
//! let keyed = Keyed { concurrency: 16, span: Span { records: 10_000, bytes: 16 << 20 } };
//! consumers.keyed(subscription, keyed, Arc::new(Greeter)).await
//! # }
//! ```

mod batch_consumer;
mod exclusion;
mod fetch_buffer;
mod handler;
mod keyed_consumer;
mod lookup;
mod membership;
mod ownership;
mod poller;
mod progress;
mod protocol;
mod report;
mod spans;
mod work;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use rdkafka::{consumer::Consumer, error::KafkaError};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

pub use handler::{Assignment, BatchHandler, Delivery, Failure, KeyedHandler, Outcome, Poison};
pub use keyed_consumer::{Keyed, Span};

use self::{
    batch_consumer::BatchConsumer,
    exclusion::Exclusion,
    keyed_consumer::{KeyedConsumer, Pool},
    lookup::Lookup,
    membership::{Client, Membership},
    poller::{End, Poller},
    progress::{Progress, Watchdog},
    report::Report,
    work::Shape,
};
use super::{Broker, Config, GroupProtocol, client_watchdog::ClientWatchdog, dead_letter::DeadLetters};
use crate::platform::{
    drain::time_over,
    memory::{Lease, budgets},
    ops::{Beat, Health},
};

/// What a consumer reads and how much at a time.
#[derive(Clone)]
pub struct Subscription {
    /// Names the consumer in logs, metrics and probes.
    pub name: &'static str,
    pub topic: String,
    pub group: String,
    /// A batch is handed over at the latest when it has this many records,
    pub max_batch_records: usize,
    /// or this many bytes of keys, values and headers.
    pub max_batch_bytes: usize,
    pub dead_letters: DeadLetters,
}

/// How long finishing, the last commit and leaving the group may take. The client library waits
/// much longer for brokers that are gone.
const LEAVE_DEADLINE: Duration = Duration::from_secs(10);
/// Least memory for a consumer, in bytes.
const LEAST_MEMORY: usize = 128 << 10;

/// Runs consumers. Cheap to clone.
#[derive(Clone)]
pub struct Consumers {
    pub config: Config,
    pub broker: Broker,
    pub health: Health,
    /// Ends every consumer: each finishes what it has in hand, commits, and leaves its group.
    pub stop: CancellationToken,
}

impl Consumers {
    /// Consumes in batches until the stop.
    pub async fn batches<H: BatchHandler>(
        &self,
        subscription: Subscription,
        handler: Arc<H>,
    ) -> Result<(), KafkaError> {
        let progress = Arc::<Progress>::default();
        let (shared, wanted, broker) = (progress.clone(), subscription.clone(), self.broker.clone());
        let shape = |client: &Arc<Client>| -> Arc<dyn Shape> {
            Arc::new(BatchConsumer {
                handler: handler.clone(),
                subscription: wanted.clone(),
                lookup: Lookup::new(client, broker.clone(), &wanted.topic),
                progress: shared.clone(),
                runtime: Handle::current(),
            })
        };
        self.run(subscription, progress, shape).await
    }

    /// Consumes key by key until the stop.
    pub async fn keyed<H: KeyedHandler>(
        &self,
        subscription: Subscription,
        keyed: Keyed,
        handler: Arc<H>,
    ) -> Result<(), KafkaError> {
        let progress = Arc::<Progress>::default();
        let pool = Pool::new(handler, subscription.clone(), keyed, progress.clone());
        self.run(subscription, progress, |_| Arc::new(KeyedConsumer(pool.clone()))).await
    }

    /// Consumes with one client after another: a client that gets nowhere is replaced.
    async fn run(
        &self,
        subscription: Subscription,
        progress: Arc<Progress>,
        shape: impl Fn(&Arc<Client>) -> Arc<dyn Shape>,
    ) -> Result<(), KafkaError> {
        let name = subscription.name;
        let beat = self.health.beat(name);
        let (published, clients) = (self.health.publish(name), Arc::<ClientWatchdog>::default());
        let mut exclusion = Exclusion::default();
        let memory = self.memory(name);
        let memory_bytes = memory.as_ref().map_or(LEAST_MEMORY, Lease::bytes);
        while let Some(client) = self.connect(&subscription, &beat, memory_bytes).await? {
            let client = Arc::new(client);
            let shape = shape(&client);
            // Set once, here; nothing polls yet.
            let _ = client.context().shape.set(shape.clone());
            client.subscribe(&[&subscription.topic])?;
            let report = Report::new(&subscription, published.clone());
            let limit = Duration::from_millis(self.config.consumer.stall_timeout_ms);
            let watchdog = Watchdog::new(limit, Instant::now());
            let (broker, progress) = (self.broker.clone(), progress.clone());
            let poller = Poller::new(client, subscription.clone(), shape, broker, progress, report, watchdog);
            match self.poll(poller, &beat, &clients, &mut exclusion).await? {
                End::Left => return Ok(()),
                End::Stuck(stuck) => clients.replaced(name, stuck.label()),
            }
        }
        Ok(())
    }

    /// Takes memory for what is fetched ahead and for the response to one more fetch. `None` when there is no more: the
    /// consumer then fetches as little as it can.
    fn memory(&self, consumer: &str) -> Option<Lease> {
        let budget = &budgets().consumers;
        let prefetch = usize::try_from(self.config.consumer.prefetch_kib).unwrap_or(usize::MAX).saturating_mul(1 << 10);
        let wanted = prefetch.saturating_mul(2).min(budget.bound() / 8).max(LEAST_MEMORY);
        let lease = budget.lease_at_most(wanted, LEAST_MEMORY);
        if lease.is_none() {
            tracing::warn!(consumer, "the memory budget of consumers is used up; raise `memory.limit_bytes`");
        }
        lease
    }

    /// Polls on a thread of its own until it ends, or until ending takes too long.
    async fn poll(
        &self,
        poller: Poller,
        beat: &Beat,
        clients: &Arc<ClientWatchdog>,
        exclusion: &mut Exclusion,
    ) -> Result<End, KafkaError> {
        let (subscription, client) = (poller.subscription.clone(), Arc::downgrade(&poller.client));
        let name = subscription.name;
        let (stop, beat, clients) = (self.stop.clone(), beat.clone(), clients.clone());
        let (ended, end) = tokio::sync::oneshot::channel();
        std::thread::Builder::new()
            .name(format!("consume-{name}"))
            .spawn(move || {
                let client = poller.client.clone();
                let end = poller.poll_until(&stop, &beat, &clients);
                // Closing a client that is stuck may take long: its successor begins meanwhile. Any other is
                // closed first.
                let closed_later = matches!(end, Ok(End::Stuck(_))).then_some(client);
                let _ = ended.send(end);
                drop(closed_later);
            })
            .map_err(|error| KafkaError::ClientCreation(error.to_string()))?;
        tokio::select! {
            ended = end => ended.unwrap_or(Err(KafkaError::Canceled)),
            () = time_over(&self.stop, LEAVE_DEADLINE) => {
                tracing::warn!(consumer = name, "left without a last commit: Kafka does not answer; what was done since is seen again");
                Ok(End::Left)
            }
            never = exclusion::watch(client, &self.config, &subscription, exclusion) => match never {},
        }
    }

    /// `None` at a stop that comes before Kafka answers.
    async fn connect(
        &self,
        subscription: &Subscription,
        beat: &Beat,
        memory: usize,
    ) -> Result<Option<Client>, KafkaError> {
        let config = &self.config;
        let Some(protocol) = protocol::choose(config, &self.broker, beat, &self.stop).await? else { return Ok(None) };
        let mut properties = config.client(subscription.name);
        protocol::set(&mut properties, protocol, config);
        properties
            .set("group.id", &subscription.group)
            .set("auto.offset.reset", "earliest")
            .set("enable.auto.commit", "true")
            .set("auto.commit.interval.ms", "1000")
            .set("enable.auto.offset.store", "false")
            .set("enable.partition.eof", "true")
            .set("allow.auto.create.topics", "false")
            // Half of it. The library bounds the response to a fetch by the same number, or by its largest record.
            .set("queued.max.messages.kbytes", (memory >> 11).to_string())
            .set("fetch.wait.max.ms", "500")
            .set("fetch.queue.backoff.ms", "5")
            .set("fetch.error.backoff.ms", "50");
        tracing::info!(
            consumer = subscription.name,
            topic = subscription.topic,
            group = subscription.group,
            ?protocol,
            "joining a consumer group"
        );
        let membership = Membership::new(subscription.name, &subscription.topic, protocol == GroupProtocol::Consumer);
        config.with_overrides(properties).create_with_context(membership).map(Some)
    }
}
