//! Writes a backlog of pushes to a topic, as fast as one producer can.
//!
//! `fill BROKERS TOPIC RECORDS KEYS [BYTES] [plain]`. Record `i` has the key `key-K` with
//! K = i · 7919 mod KEYS, so that every run of KEYS records has every key once, in a scattered
//! order, and anyone can tell the newest record of a key. Its value is a JSON string of BYTES
//! (100) bytes, quotes included, that begins with `i` in ten digits; the rest hardly compresses.
//! Headers are those of a real push, unless `plain`.

use std::{
    env,
    error::Error,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use postrider::platform::{kafka::event::Event, trace_context::TraceContext};
use rdkafka::{
    ClientConfig, ClientContext,
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
}

fn plan() -> Result<Plan, Box<dyn Error>> {
    let mut words: Vec<String> = env::args().skip(1).collect();
    let plain = words.last().is_some_and(|word| word == "plain");
    if plain {
        words.pop();
    }
    let [brokers, topic, records, keys, bytes @ ..] = &words[..] else {
        return Err("usage: fill BROKERS TOPIC RECORDS KEYS [BYTES] [plain]".into());
    };
    let plan = Plan {
        brokers: brokers.clone(),
        topic: topic.clone(),
        records: records.parse()?,
        keys: keys.parse()?,
        bytes: bytes.first().map_or(Ok(100), |word| word.parse())?,
        plain,
    };
    if plan.keys == 0 || plan.keys.is_multiple_of(STRIDE) || plan.bytes < 12 {
        return Err(format!("KEYS must not be 0 or a multiple of {STRIDE}, and BYTES at least 12").into());
    }
    Ok(plan)
}

fn producer(brokers: &str) -> Result<BaseProducer<Deliveries>, KafkaError> {
    ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("partitioner", "murmur2_random")
        .set("compression.type", "lz4")
        .set("linger.ms", "20")
        .set("batch.size", "1000000")
        .set("queue.buffering.max.messages", "500000")
        .create_with_context(Deliveries::default())
}

/// The value of record `number`, into `value`, whose length is its size.
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

fn fill(plan: &Plan) -> Result<(), Box<dyn Error>> {
    let producer = producer(&plan.brokers)?;
    let mut value = vec![0; plan.bytes];
    for number in 0..plan.records {
        let key = format!("key-{}", number * STRIDE % plan.keys);
        write_value(&mut value, number);
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
