//! The reader of the topics: reads all records into the ledger, from the first on and through all
//! faults.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    message::{BorrowedMessage, Headers},
};
use serde_json::Value;

use super::{
    events::{Posted, Presence, Undelivered},
    ledger::{Ledger, Record, Topic},
};
use crate::harness::{World, sessions::Name};

/// Time without a record from a partition that has more, after which the client is replaced. A
/// client can forget all its brokers and never connect again (librdkafka 5301).
const STUCK: Duration = Duration::from_secs(5);
/// Time limit for a query of one partition.
const PATIENCE: Duration = Duration::from_secs(1);

pub fn consumer(brokers: &str, group: &str) -> BaseConsumer {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers).set("group.id", group).set("log_level", "0");
    config.set("enable.auto.commit", "false").set("fetch.wait.max.ms", "100").set("reconnect.backoff.max.ms", "500");
    // The defaults are to start at the end, and a timeout of one minute, which is as long as a run.
    config.set("auto.offset.reset", "earliest");
    config.set("socket.timeout.ms", "5000");
    config.create().unwrap()
}

/// Reads all topics into the ledger until it is dropped.
pub struct Tail {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Tail {
    /// Starts the reader; `partitions` has the number of partitions of each topic.
    pub fn start(world: &World, partitions: &BTreeMap<Topic, i32>, ledger: Ledger) -> Self {
        let names = partitions.keys().map(|topic| (world.topic(topic.name()), *topic)).collect();
        let places = partitions.iter().flat_map(|(topic, count)| {
            let name = world.topic(topic.name());
            (0..*count).map(move |partition| ((name.clone(), partition), Progress::default()))
        });
        let places = places.collect();
        let stop = Arc::new(AtomicBool::new(false));
        let (brokers, stopped) = (world.kafka.brokers.clone(), stop.clone());
        let thread = std::thread::spawn(move || Reader { brokers, names, places, ledger }.read(&stopped));
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // After a panic, the judge would see no more records.
            assert!(thread.join().is_ok() || std::thread::panicking(), "the thread that follows the topics panicked");
        }
    }
}

/// The next offset of a partition, now and at the last check.
#[derive(Default)]
struct Progress {
    next: i64,
    looked: i64,
}

struct Reader {
    brokers: String,
    names: BTreeMap<String, Topic>,
    places: BTreeMap<(String, i32), Progress>,
    ledger: Ledger,
}

impl Reader {
    fn read(mut self, stop: &AtomicBool) {
        let mut consumer = self.connect();
        let mut looked = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            // Errors are expected during faults.
            if let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) {
                self.take(&message);
            }
            if looked.elapsed() > STUCK {
                if self.is_stuck(&consumer) {
                    eprintln!(
                        "soak: {:6.1} s  the judge continues with a new client",
                        self.ledger.now_ms() as f64 / 1e3
                    );
                    let old = std::mem::replace(&mut consumer, self.connect());
                    // Dropping a client may take a while.
                    std::thread::spawn(move || drop(old));
                }
                looked = Instant::now();
            }
        }
    }

    /// Creates a client that continues at the current positions.
    fn connect(&self) -> BaseConsumer {
        let mut wanted = TopicPartitionList::new();
        for ((name, partition), progress) in &self.places {
            wanted.add_partition_offset(name, *partition, Offset::Offset(progress.next)).unwrap();
        }
        let consumer = consumer(&self.brokers, "soak-tail");
        consumer.assign(&wanted).unwrap();
        consumer
    }

    /// Returns whether a partition has more records but none arrived since the last check, or a
    /// query failed.
    fn is_stuck(&mut self, consumer: &BaseConsumer) -> bool {
        let mut stuck = false;
        for ((name, partition), progress) in &mut self.places {
            let still = progress.next == progress.looked;
            progress.looked = progress.next;
            stuck = stuck
                || still
                    && consumer
                        .fetch_watermarks(name, *partition, PATIENCE)
                        .map_or(true, |(_, end)| end > progress.next);
        }
        stuck
    }

    fn take(&mut self, message: &BorrowedMessage<'_>) {
        let place = (message.topic().to_owned(), message.partition());
        let (Some(topic), Some(progress)) = (self.names.get(message.topic()), self.places.get_mut(&place)) else {
            return;
        };
        // A replaced client may have read it already.
        if message.offset() < progress.next {
            return;
        }
        progress.next = message.offset() + 1;
        if !write_down(*topic, message, &self.ledger) {
            let value = String::from_utf8_lossy(message.payload().unwrap_or_default());
            self.ledger.incident(format!("{} {place:?} has an unexpected record: {value}", topic.name()));
        }
    }
}

/// Adds a record to the ledger; returns whether it is valid.
fn write_down(topic: Topic, message: &BorrowedMessage<'_>, ledger: &Ledger) -> bool {
    let id = || header(message, "ce_id").unwrap_or_default();
    let key = String::from_utf8_lossy(message.key().unwrap_or_default()).into_owned();
    let value = || serde_json::from_slice::<Value>(message.payload().unwrap_or_default()).unwrap_or_default();
    match topic {
        Topic::Posts => {
            let found = Posted::read((message.partition(), message.offset()), id(), key, &value());
            found.map(|found| ledger.evidence().posts.push(found)).is_some()
        }
        Topic::Presence => {
            let found = Presence::read(id(), &key, &value(), ledger);
            found.map(|found| ledger.evidence().presence.push(found)).is_some()
        }
        Topic::Undelivered => {
            let at_ms = message.timestamp().to_millis().unwrap_or_default();
            let found = Undelivered::read(id(), &key, at_ms, &value(), ledger);
            found.map(|found| ledger.evidence().undelivered.push(found)).is_some()
        }
        _ => {
            ledger.evidence().logs.entry(topic).or_default().push(record(topic, message));
            true
        }
    }
}

fn header(message: &impl Message, name: &str) -> Option<String> {
    let headers = message.headers()?;
    let found = headers.iter().find(|header| header.key == name)?;
    Some(String::from_utf8_lossy(found.value.unwrap_or_default()).into_owned())
}

fn record(topic: Topic, message: &impl Message) -> Record {
    let header = |name: &str| header(message, name);
    let number = |name: &str| header(name).and_then(|text| text.parse().ok());
    let value = message.payload().and_then(|value| serde_json::from_slice(value).ok());
    let origin = number("original-partition").zip(number("original-offset"));
    let name = value.as_ref().filter(|_| topic == Topic::Chat).and_then(Name::of);
    Record {
        place: (message.partition(), message.offset()),
        // Messages have a constant record key, so this key is receiver and sender instead.
        key: match &name {
            Some(Name { receiver, sender, .. }) => format!("{receiver} {sender}"),
            None => String::from_utf8_lossy(message.key().unwrap_or_default()).into_owned(),
        },
        number: value.as_ref().and_then(|value| number_of(topic, value)),
        id: header("ce_id").unwrap_or_default(),
        version: number("postrider-version"),
        expires: header("postrider-expires-at").is_some(),
        origin: origin.map(|(partition, offset)| (partition as i32, offset)),
    }
}

/// Returns the number that a sender put into a value.
pub fn number_of(topic: Topic, value: &Value) -> Option<u64> {
    match topic {
        Topic::Comments => value["text"].as_str()?.rsplit(' ').next()?.parse().ok(),
        Topic::Chat => Name::of(value).map(|name| name.number),
        _ => value["n"].as_u64(),
    }
}
