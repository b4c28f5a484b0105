//! Writes a backlog of pushes to a topic, as fast as one producer can, or at a constant rate.
//!
//! Usage: `fill BROKERS TOPIC RECORDS KEYS [BYTES] [plain] [partitions=N] [rate=N]`
//!
//! - Record `i` has the key `key-K` with K = i · 7919 mod KEYS. So each run of KEYS records has every key once, in a
//!   scattered order, and the newest record of each key can be computed.
//! - The value is a JSON string of BYTES bytes (default 100), including the quotes. It begins with `i` in ten digits;
//!   the rest hardly compresses.
//! - The headers are those of a real push; with `plain` there are none.
//! - With `partitions`, the topic is created first.
//! - With `rate`, that many records are written per second, evenly spaced. A value is then a JSON object that begins
//!   with `at`: the time at which the record was due, in microseconds since the epoch.

use std::{
    env,
    error::Error,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use postrider_kafka::event::Event;
use postrider_telemetry::trace_context::TraceContext;
use rdkafka::{
    ClientConfig, ClientContext,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    error::{KafkaError, RDKafkaErrorCode},
    message::DeliveryResult,
    producer::{BaseProducer, BaseRecord, Producer, ProducerContext},
};
use uuid::Uuid;

const STRIDE: u64 = 7919;

#[derive(Default)]
struct Deliveries {
    stored: AtomicU64,
    failed: AtomicU64,
}

impl ClientContext for Deliveries {}

impl ProducerContext for Deliveries {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        let count = if result.is_ok() { &self.stored } else { &self.failed };
        count.fetch_add(1, Ordering::Relaxed);
    }
}

struct Plan {
    brokers: String,
    topic: String,
    records: u64,
    keys: u64,
    bytes: usize,
    plain: bool,
    partitions: Option<i32>,
    /// Records per second; `None` is as fast as possible.
    rate: Option<f64>,
}

fn plan() -> Result<Plan, Box<dyn Error>> {
    let words: Vec<String> = env::args().skip(1).collect();
    let [brokers, topic, records, keys, more @ ..] = &words[..] else {
        return Err("usage: fill BROKERS TOPIC RECORDS KEYS [BYTES] [plain] [partitions=N] [rate=N]".into());
    };
    let mut plan = Plan {
        brokers: brokers.clone(),
        topic: topic.clone(),
        records: records.parse()?,
        keys: keys.parse()?,
        bytes: 100,
        plain: false,
        partitions: None,
        rate: None,
    };
    for word in more {
        match word.split_once('=') {
            Some(("partitions", count)) => plan.partitions = Some(count.parse()?),
            Some(("rate", rate)) => plan.rate = Some(rate.parse()?),
            _ if word == "plain" => plan.plain = true,
            _ => plan.bytes = word.parse()?,
        }
    }
    if plan.keys == 0 || plan.keys.is_multiple_of(STRIDE) || plan.bytes < 40 {
        return Err(format!("KEYS must not be 0 or a multiple of {STRIDE}, and BYTES at least 40").into());
    }
    Ok(plan)
}

fn make_topic(plan: &Plan, partitions: i32) -> Result<(), Box<dyn Error>> {
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", &plan.brokers).create()?;
    let topic = NewTopic::new(&plan.topic, partitions, TopicReplication::Fixed(1));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    for made in runtime.block_on(admin.create_topics([&topic], &AdminOptions::new()))? {
        made.map_err(|(topic, code)| format!("{topic}: {code}"))?;
    }
    Ok(())
}

fn producer(plan: &Plan) -> Result<BaseProducer<Deliveries>, KafkaError> {
    ClientConfig::new()
        .set("bootstrap.servers", &plan.brokers)
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("partitioner", "murmur2_random")
        .set("compression.type", "lz4")
        .set("linger.ms", if plan.rate.is_some() { "10" } else { "20" })
        .set("batch.size", "1000000")
        .set("queue.buffering.max.messages", "500000")
        .create_with_context(Deliveries::default())
}

/// Fills `value` with the value of record `number`.
fn write_value(value: &mut [u8], number: u64) {
    let last = value.len() - 1;
    (value[0], value[last]) = (b'"', b'"');
    let mut rest = number;
    for slot in value[1..11].iter_mut().rev() {
        *slot = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    for slot in &mut value[11..last] {
        *slot = fastrand::alphanumeric() as u8;
    }
}

/// Waits until a record is due, and writes that time into its value.
fn await_due(producer: &BaseProducer<Deliveries>, value: &mut [u8], begun: (Instant, SystemTime), after: Duration) {
    while let Some(left) = after.checked_sub(begun.0.elapsed()).filter(|left| !left.is_zero()) {
        // The client's own wait has a resolution of 1 ms, and would spin for less.
        std::thread::sleep(left.min(Duration::from_millis(1)));
        producer.poll(Duration::ZERO);
    }
    let due = (begun.1 + after).duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros());
    let head = format!("{{\"at\":{due},\"text\":\"");
    value[..head.len()].copy_from_slice(head.as_bytes());
    let last = value.len() - 1;
    (value[last - 1], value[last]) = (b'"', b'}');
}

fn fill(plan: &Plan) -> Result<(), Box<dyn Error>> {
    if let Some(partitions) = plan.partitions {
        make_topic(plan, partitions)?;
    }
    let producer = producer(plan)?;
    let begun = (Instant::now(), SystemTime::now());
    let mut value = vec![0; plan.bytes];
    for number in 0..plan.records {
        let key = format!("key-{}", number * STRIDE % plan.keys);
        write_value(&mut value, number);
        if let Some(rate) = plan.rate {
            await_due(&producer, &mut value, begun, Duration::from_secs_f64(number as f64 / rate));
        }
        let mut record = BaseRecord::to(&plan.topic).key(&key).payload(&value);
        if !plan.plain {
            let trace = TraceContext::root();
            let event = Event { id: Uuid::now_v7(), kind: "postrider.kv.pushed", source: "/kv", trace };
            record = record.headers(event.headers(0));
        }
        while let Err((error, refused)) = producer.send(record) {
            if error.rdkafka_error_code() != Some(RDKafkaErrorCode::QueueFull) {
                return Err(error.into());
            }
            producer.poll(Duration::from_millis(10));
            record = refused;
        }
        if number % 1_000 == 0 {
            producer.poll(Duration::ZERO);
        }
    }
    producer.flush(Duration::from_secs(120))?;
    let deliveries = producer.context();
    let (stored, failed) = (deliveries.stored.load(Ordering::Relaxed), deliveries.failed.load(Ordering::Relaxed));
    if failed > 0 || stored != plan.records {
        return Err(format!("{stored} of {} records are stored, {failed} failed", plan.records).into());
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let plan = plan()?;
    let begun = Instant::now();
    fill(&plan)?;
    println!("{} records in {:.1} s", plan.records, begun.elapsed().as_secs_f64());
    Ok(())
}
