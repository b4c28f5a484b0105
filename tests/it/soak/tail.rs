//! Follows the topics and what is committed of them, from the first record on and through all faults.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    message::Headers,
};
use serde_json::Value;

use super::ledger::{Commit, Ledger, Record, Topic};
use crate::harness::{World, sessions::Name};

const PATIENCE: Duration = Duration::from_secs(5);

fn consumer(brokers: &str, group: &str) -> BaseConsumer {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers).set("group.id", group).set("log_level", "0");
    config.set("enable.auto.commit", "false").set("fetch.wait.max.ms", "100").set("reconnect.backoff.max.ms", "500");
    config.create().unwrap()
}

/// Reads all topics into the ledger until it is dropped.
pub struct Tail {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Tail {
    /// `partitions` says how many each topic has.
    pub fn start(world: &World, partitions: &BTreeMap<Topic, i32>, ledger: Ledger) -> Self {
        let names: BTreeMap<String, Topic> =
            partitions.keys().map(|topic| (world.topic(topic.name()), *topic)).collect();
        let mut wanted = TopicPartitionList::new();
        for (name, topic) in &names {
            for partition in 0..partitions[topic] {
                wanted.add_partition_offset(name, partition, Offset::Beginning).unwrap();
            }
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (brokers, stopped) = (world.kafka.brokers.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let consumer = consumer(&brokers, "soak-tail");
            consumer.assign(&wanted).unwrap();
            while !stopped.load(Ordering::Relaxed) {
                // Errors are the faults of the moment; the client goes on by itself.
                let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) else { continue };
                let topic = names[message.topic()];
                ledger.evidence().logs.entry(topic).or_default().push(record(topic, &message));
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn record(topic: Topic, message: &impl Message) -> Record {
    let header = |name: &str| {
        let headers = message.headers()?;
        let found = headers.iter().find(|header| header.key == name)?;
        Some(String::from_utf8_lossy(found.value.unwrap_or_default()).into_owned())
    };
    let number = |name: &str| header(name).and_then(|text| text.parse().ok());
    let value = message.payload().and_then(|value| serde_json::from_slice(value).ok());
    let origin = number("original-partition").zip(number("original-offset"));
    let name = value.as_ref().filter(|_| topic == Topic::Chat).and_then(Name::of);
    Record {
        place: (message.partition(), message.offset()),
        // All messages have one key.
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

/// The number that a sender put into a value.
pub fn number_of(topic: Topic, value: &Value) -> Option<u64> {
    match topic {
        Topic::Comments => value["text"].as_str()?.rsplit(' ').next()?.parse().ok(),
        Topic::Chat => Name::of(value).map(|name| name.number),
        _ => value["n"].as_u64(),
    }
}

/// Looks at what the groups have committed.
pub struct Commits {
    groups: Vec<(Topic, String, BaseConsumer, TopicPartitionList)>,
}

impl Commits {
    pub fn new(world: &World, groups: &[(Topic, &str)], partitions: &BTreeMap<Topic, i32>) -> Self {
        let look = |(topic, group): &(Topic, &str)| {
            let name = world.topic(topic.name());
            let mut wanted = TopicPartitionList::new();
            for partition in 0..partitions[topic] {
                wanted.add_partition(&name, partition);
            }
            // Groups have the same prefix as topics.
            (*topic, name, consumer(&world.kafka.brokers, &world.topic(group)), wanted)
        };
        Self { groups: groups.iter().map(look).collect() }
    }

    /// The commits of each group; nothing of a group whose brokers do not answer.
    pub fn sample(&self, ledger: &Ledger) -> Vec<Commit> {
        let look = |(topic, _, consumer, wanted): &(Topic, String, BaseConsumer, TopicPartitionList)| {
            let found = consumer.committed_offsets(wanted.clone(), PATIENCE).ok()?;
            let offset = |offset| match offset {
                Offset::Offset(offset) => Some(offset),
                _ => None,
            };
            let elements = found.elements();
            let offsets = elements.iter().filter_map(|of| Some((of.partition(), offset(of.offset())?))).collect();
            let deliveries = ledger.evidence().deliveries.len();
            Some(Commit { topic: *topic, at_ms: ledger.now_ms(), offsets, reached: BTreeMap::new(), deliveries })
        };
        self.groups.iter().filter_map(look).collect()
    }

    /// Where the topics of the groups end.
    pub fn ends(&self) -> Option<BTreeMap<Topic, BTreeMap<i32, i64>>> {
        let mut ends: BTreeMap<Topic, BTreeMap<i32, i64>> = BTreeMap::new();
        for (topic, name, consumer, wanted) in &self.groups {
            for partition in wanted.elements().iter().map(|of| of.partition()) {
                let (_, end) = consumer.fetch_watermarks(name, partition, PATIENCE).ok()?;
                ends.entry(*topic).or_default().insert(partition, end);
            }
        }
        Some(ends)
    }
}
