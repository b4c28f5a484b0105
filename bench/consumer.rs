//! Measures the consumer runtime alone, on a topic with a backlog, or a bare loop of the client library.
//!
//! `consumer BROKERS TOPIC RECORDS bare|batch|keyed` runs a handler that does nothing, and
//! `consumer BROKERS TOPIC RECORDS sleep MILLISECONDS CONCURRENCY` one that sleeps. Prints one line of JSON. Each run
//! has a new consumer group, so all runs read the same records.

use std::{
    env,
    error::Error,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use postrider_health::Health;
use postrider_kafka::{
    Broker, Config, DeadLetters, Producer,
    batch::Batch,
    consumer::{
        Assignment, BatchHandler, Consumers, Delivery, Failure, Keyed, KeyedHandler, Lag, Outcome, Poison, Span,
        Subscription,
    },
};
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

// The product's allocator, for both sides of the comparison.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Answer<T> = Result<T, Box<dyn Error>>;

/// Totals of the records that handlers have finished.
#[derive(Default)]
struct Tally {
    records: AtomicU64,
    bytes: AtomicU64,
    /// Total time in handlers that sleep, in microseconds.
    busy_us: AtomicU64,
    slowest_us: AtomicU64,
}

impl Tally {
    fn add(&self, bytes: usize) {
        self.records.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn count(&self) -> u64 {
        self.records.load(Ordering::Relaxed)
    }
}

struct Nothing {
    tally: Arc<Tally>,
    pause: Option<Duration>,
}

impl BatchHandler for Nothing {
    type Partition = ();

    async fn assigned(&self, assignment: Assignment) -> Result<((), i64), Failure> {
        Ok(((), assignment.resume()))
    }

    async fn apply(&self, (): &mut (), batch: &Batch) -> Result<Vec<Poison>, Failure> {
        let bytes: usize = batch.iter().map(|record| record.value().map_or(0, <[u8]>::len)).sum();
        self.tally.records.fetch_add(batch.len() as u64, Ordering::Relaxed);
        self.tally.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(Vec::new())
    }
}

impl KeyedHandler for Nothing {
    async fn handle(&self, delivery: &Delivery) -> Outcome {
        if let Some(pause) = self.pause {
            let begun = Instant::now();
            tokio::time::sleep(pause).await;
            let took = u64::try_from(begun.elapsed().as_micros()).unwrap_or(0);
            self.tally.busy_us.fetch_add(took, Ordering::Relaxed);
            self.tally.slowest_us.fetch_max(took, Ordering::Relaxed);
        }
        self.tally.add(delivery.record().value().map_or(0, <[u8]>::len));
        Outcome::Done
    }
}

struct Plan {
    brokers: String,
    topic: String,
    records: u64,
    what: String,
    pause: Option<Duration>,
    concurrency: usize,
    group: String,
}

fn plan() -> Result<Plan, Box<dyn Error>> {
    let words: Vec<String> = env::args().skip(1).collect();
    let [brokers, topic, records, what, more @ ..] = &words[..] else {
        return Err("usage: consumer BROKERS TOPIC RECORDS bare|batch|keyed|sleep [MILLISECONDS CONCURRENCY]".into());
    };
    let (pause, concurrency) = match more {
        [ms, concurrency] => (Some(Duration::from_millis(ms.parse()?)), concurrency.parse()?),
        _ => (None, 64),
    };
    let group = format!("bench-{what}-{}", std::process::id());
    let (brokers, topic, what) = (brokers.clone(), topic.clone(), what.clone());
    Ok(Plan { brokers, topic, records: records.parse()?, what, pause, concurrency, group })
}

/// Runs a loop of the client library alone, with the properties that the runtime sets.
fn bare(plan: &Plan, tally: &Tally) -> Result<f64, Box<dyn Error>> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &plan.brokers)
        .set("group.id", &plan.group)
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "true")
        .set("auto.commit.interval.ms", "1000")
        .set("queued.max.messages.kbytes", Config::default().consumer.prefetch_kib.to_string())
        .set("fetch.wait.max.ms", "500")
        .set("fetch.queue.backoff.ms", "5")
        .create()?;
    consumer.subscribe(&[&plan.topic])?;
    let mut begun = None;
    while tally.count() < plan.records {
        let Some(message) = consumer.poll(Duration::from_millis(100)) else { continue };
        let message = message?;
        begun.get_or_insert_with(Instant::now);
        tally.add(message.payload().map_or(0, <[u8]>::len));
    }
    Ok(begun.map_or(0.0, |begun| begun.elapsed().as_secs_f64()))
}

async fn consumer(plan: &Plan, tally: &Arc<Tally>) -> Result<Value, Box<dyn Error>> {
    let config = Config { brokers: vec![plan.brokers.clone()], ..Config::default() };
    let (health, stop) = (Health::default(), CancellationToken::new());
    let broker = Broker::start(&config, health.check("kafka"))?;
    let producer = Producer::start(&config, broker.clone())?;
    let consumer = Consumers { config, broker, health, stop: stop.clone() };
    let subscription = Subscription {
        name: "bench",
        topic: plan.topic.clone(),
        group: plan.group.clone(),
        max_batch_records: 2_000,
        max_batch_bytes: 1 << 20,
        dead_letters: DeadLetters::new(producer, "bench-dead-letters".to_owned()),
        lag: Lag::default(),
    };
    let handler = Arc::new(Nothing { tally: tally.clone(), pause: plan.pause });
    let keyed = Keyed { concurrency: plan.concurrency, span: Span { records: 50_000, bytes: 64 << 20 } };
    let what = plan.what.clone();
    let running = tokio::spawn(async move {
        match what.as_str() {
            "batch" => consumer.batches(subscription, handler).await,
            _ => consumer.keyed(subscription, keyed, handler).await,
        }
    });
    let result = watch(plan, tally).await?;
    stop.cancel();
    running.await??;
    Ok(result)
}

/// Measures the seconds from the first record to the last, and the longest lag of the group's commits.
async fn watch(plan: &Plan, tally: &Tally) -> Result<Value, Box<dyn Error>> {
    let committed = committed(plan)?;
    let mut begun = None;
    let mut history: Vec<(Instant, u64)> = Vec::new();
    let (mut worst, mut asked, mut ended) = (Duration::ZERO, Instant::now(), None);
    loop {
        let (now, done) = (Instant::now(), tally.count());
        if done > 0 {
            begun.get_or_insert(now);
            history.push((now, done));
        }
        if done >= plan.records {
            ended.get_or_insert((now, done));
        }
        if done > 0 && asked.elapsed() > Duration::from_millis(250) {
            asked = now;
            let point = committed()?;
            // The earliest time at which more was finished than is committed now.
            let behind = history.iter().find(|(_, count)| *count > point);
            worst = worst.max(behind.map_or(Duration::ZERO, |(since, _)| now - *since));
            if ended.is_some() && point >= plan.records {
                break;
            }
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (seconds, records) =
        ended.zip(begun).map_or((0.0, 0), |((ended, count), begun)| ((ended - begun).as_secs_f64(), count));
    Ok(json!({ "seconds": seconds, "records": records, "commit_lag_ms": worst.as_millis() as u64 }))
}

/// Returns a function that reads the sum of the group's commits.
fn committed(plan: &Plan) -> Result<impl Fn() -> Answer<u64> + use<>, Box<dyn Error>> {
    let reader: BaseConsumer =
        ClientConfig::new().set("bootstrap.servers", &plan.brokers).set("group.id", &plan.group).create()?;
    let metadata = reader.fetch_metadata(Some(&plan.topic), Duration::from_secs(5))?;
    let partitions = metadata.topics().first().map_or(0, |topic| topic.partitions().len());
    let topic = plan.topic.clone();
    Ok(move || {
        let mut wanted = TopicPartitionList::new();
        wanted.add_partition_range(&topic, 0, partitions as i32 - 1);
        let found = reader.committed_offsets(wanted, Duration::from_secs(5))?;
        let offsets = found.elements().into_iter().map(|element| match element.offset() {
            Offset::Offset(offset) => u64::try_from(offset).unwrap_or(0),
            _ => 0,
        });
        Ok(offsets.sum())
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    let (plan, tally) = (plan()?, Arc::<Tally>::default());
    let mut result = if plan.what == "bare" {
        json!({ "seconds": bare(&plan, &tally)?, "records": plan.records })
    } else {
        // As in the processor role, so that the consumers may use as much memory as the bare loop.
        postrider_limits::memory::divide(&postrider_limits::memory::Config::default(), false);
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        runtime.block_on(consumer(&plan, &tally))?
    };
    let (records, seconds) = (result["records"].as_f64().unwrap_or(0.0), result["seconds"].as_f64().unwrap_or(0.0));
    result["rps"] = json!((records / seconds).round());
    if plan.pause.is_some() {
        let handler_ms = tally.busy_us.load(Ordering::Relaxed) as f64 / tally.count() as f64 / 1e3;
        result["handler_ms"] = json!(handler_ms);
        result["slowest_ms"] = json!(tally.slowest_us.load(Ordering::Relaxed) as f64 / 1e3);
        result["allowed_rps"] = json!((plan.concurrency as f64 * 1e3 / handler_ms).round());
    }
    println!("{result}");
    Ok(())
}
