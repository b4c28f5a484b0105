//! Consumer runtime. It processes records in order, commits offsets only after their effects, and
//! keeps one partition from delaying another and, with a keyed handler, one key from delaying
//! another.
//!
//! It has two shapes. A [`BatchHandler`] gets the records of a partition in order, a batch at a
//! time; it suits projections, whose effect is one set-based write. A [`KeyedHandler`] gets one
//! record at a time: records of one key in order, different keys concurrently. It suits slow
//! effects, such as HTTP requests to external endpoints.
//!
//! Both shapes guarantee:
//!
//! - The commit point of a partition is the offset of its lowest unfinished record. It is committed
//!   within a second, at every rebalance and at shutdown, and never passes an unfinished effect.
//! - The records between the commit point and the last record read form the span. Its records and
//!   bytes are bounded. When it is full, the partition pauses and others continue; the log, the
//!   metrics and `/consumers` on the management port name the record that holds it.
//! - While a dependency is down, its records are retried with backoff for as long as it takes.
//!   Records that can never be processed are dead-lettered, and count as finished once the dead
//!   letter is stored.
//! - When a partition is revoked, it has five seconds to finish the records being processed;
//!   unfinished ones are abandoned, and the next owner processes them. Finished work is committed
//!   before the next owner begins, and nothing is committed for the partition afterwards.
//! - If records wait and no handler finishes an attempt, successful or not, for
//!   `kafka.consumer.stall_timeout_ms`, the process fails its liveness probe.
//!
//! # A capability in forty lines
//!
//! ```no_run
//! use std::{sync::Arc, time::Duration};
//! use postrider_kafka::{
//!     dead_letter::{DeadLetters, Reason},
//!     consumer::{Delivery, KeyedHandler, Keyed, Consumers, Lag, Outcome, Span, Subscription},
//! };
//!
//! /// Greets the person that a record names.
//! struct Greeter;
//!
//! impl KeyedHandler for Greeter {
//!     async fn handle(&self, delivery: &Delivery) -> Outcome {
//!         let Some(value) = delivery.record().value() else { return Outcome::Done };
//!         let Ok(name) = std::str::from_utf8(value) else {
//!             return Outcome::DeadLetter(Reason { class: "not_text", message: "the value is not UTF-8".into() });
//!         };
//!         let Err(error) = greet(name).await else { return Outcome::Done };
//!         let reason = Reason { class: "greeting_failed", message: error.to_string() };
//!         match delivery.attempt() {
//!             ..4 => Outcome::RetryAfter(Duration::from_secs(1), reason),
//!             _ => Outcome::DeadLetter(reason),
//!         }
//!     }
//! }
//! # async fn greet(_name: &str) -> std::io::Result<()> { Ok(()) }
//!
//! # async fn start(consumers: Consumers, dead_letters: DeadLetters) -> Result<(), rdkafka::error::KafkaError> {
//! let subscription = Subscription {
//!     name: "greeter",
//!     topic: "names".into(),
//!     group: "greeters".into(),
//!     max_batch_records: 500,
//!     max_batch_bytes: 256 << 10,
//!     dead_letters,
//!     lag: Lag::default(),
//! };
//! let keyed = Keyed { concurrency: 16, span: Span { records: 10_000, bytes: 16 << 20 } };
//! consumers.keyed(subscription, keyed, Arc::new(Greeter)).await
//! # }
//! ```

mod batch_consumer;
mod commit_reset;
mod exclusion;
mod fetch_buffer;
mod fetch_watchdog;
mod handler;
mod keyed_consumer;
mod lookup;
mod membership;
mod ownership_proof;
mod poller;
mod protocol;
mod report;
mod spans;
mod stall;
mod work;

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use postrider_health::{Beat, Health};
use postrider_limits::memory::{Lease, budgets};
use postrider_process::drain::time_over;
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
    report::Report,
    stall::{Progress, Watchdog},
    work::Shape,
};
use super::{Broker, Config, GroupProtocol, client_watchdog::ClientWatchdog, dead_letter::DeadLetters};

/// Topic and group that a consumer reads, and the limits of its batches.
#[derive(Clone)]
pub struct Subscription {
    /// Name of the consumer in logs, metrics and probes.
    pub name: &'static str,
    pub topic: String,
    pub group: String,
    /// Number of records at which a batch is handed over, if not earlier.
    pub max_batch_records: usize,
    /// Bytes of keys, values and headers at which a batch is handed over, if not earlier.
    pub max_batch_bytes: usize,
    pub dead_letters: DeadLetters,
    /// Set by the consumer every few seconds.
    pub lag: Lag,
}

/// Number of records past the commits of a consumer's partitions. Clones share it.
#[derive(Debug, Clone)]
pub struct Lag(Arc<AtomicI64>);

impl Default for Lag {
    fn default() -> Self {
        Self(Arc::new(AtomicI64::new(-1)))
    }
}

impl Lag {
    /// Returns the number of records; `None` until it is known.
    pub fn records(&self) -> Option<u64> {
        u64::try_from(self.0.load(Ordering::Relaxed)).ok()
    }
}

/// Timeout for finishing, the last commit and leaving the group. The client library waits much
/// longer for brokers that do not answer.
const LEAVE_DEADLINE: Duration = Duration::from_secs(10);
/// Minimum memory of a consumer, in bytes.
const MIN_MEMORY_BYTES: usize = 128 << 10;

/// Runs consumers. Cheap to clone.
#[derive(Clone)]
pub struct Consumers {
    pub config: Config,
    pub broker: Broker,
    pub health: Health,
    /// Stops every consumer: each finishes the records being processed, commits, and leaves its
    /// group.
    pub stop: CancellationToken,
}

impl Consumers {
    /// Runs a batch consumer until the stop.
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

    /// Runs a keyed consumer until the stop.
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

    /// Runs the consumer, replacing its client whenever the client is stuck.
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
        let memory_bytes = memory.as_ref().map_or(MIN_MEMORY_BYTES, Lease::bytes);
        while let Some(client) = self.connect(&subscription, &beat, memory_bytes).await? {
            let client = Arc::new(client);
            let shape = shape(&client);
            // The shape is set once, before anything polls.
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

    /// Leases memory for prefetched records and for the response to one more fetch. `None` if the
    /// budget is used up; the consumer then fetches as little as possible.
    fn memory(&self, consumer: &str) -> Option<Lease> {
        let budget = &budgets().consumers;
        let prefetch = usize::try_from(self.config.consumer.prefetch_kib).unwrap_or(usize::MAX).saturating_mul(1 << 10);
        let wanted = prefetch.saturating_mul(2).min(budget.bound() / 8).max(MIN_MEMORY_BYTES);
        let lease = budget.lease_at_most(wanted, MIN_MEMORY_BYTES);
        if lease.is_none() {
            tracing::warn!(consumer, "memory budget of consumers is used up; raise `memory.limit_bytes`");
        }
        lease
    }

    /// Polls on a dedicated thread until polling ends, or until shutdown exceeds its deadline.
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
                // Closing a stuck client may take long, so its successor starts meanwhile. Any
                // other client is closed first.
                let closed_later = matches!(end, Ok(End::Stuck(_))).then_some(client);
                let _ = ended.send(end);
                drop(closed_later);
            })
            .map_err(|error| KafkaError::ClientCreation(error.to_string()))?;
        tokio::select! {
            ended = end => ended.unwrap_or(Err(KafkaError::Canceled)),
            () = time_over(&self.stop, LEAVE_DEADLINE) => {
                tracing::warn!(consumer = name, "kafka does not answer, leaving without a last commit; work finished since the previous commit is repeated");
                Ok(End::Left)
            }
            never = exclusion::watch(client, &self.config, &subscription, exclusion) => match never {},
        }
    }

    /// Creates a client; `None` if the stop comes before Kafka answers.
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
            // Half of the memory, because the library limits the response to a fetch by the same
            // number, or by its largest record.
            .set("queued.max.messages.kbytes", (memory >> 11).to_string())
            // A partition that is assigned or resumed while a fetch of the others waits is first read
            // when that fetch ends.
            .set("fetch.wait.max.ms", "200")
            .set("fetch.queue.backoff.ms", "5")
            .set("fetch.error.backoff.ms", "50");
        tracing::info!(
            consumer = subscription.name,
            topic = subscription.topic,
            group = subscription.group,
            ?protocol,
            "joining consumer group"
        );
        let membership = Membership::new(
            subscription.name,
            &subscription.topic,
            protocol == GroupProtocol::Consumer,
            subscription.lag.0.clone(),
        );
        config.with_overrides(properties).create_with_context(membership).map(Some)
    }
}
