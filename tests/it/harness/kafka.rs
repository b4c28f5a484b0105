//! Direct access to Kafka with its own client.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, ConfigSource, NewTopic, ResourceSpecifier, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
    message::{Header, Headers, OwnedHeaders},
    producer::{BaseProducer, BaseRecord, Producer},
};
use serde_json::Value;

use super::{stack::off_runtime, wait::until};

const PATIENCE: Duration = Duration::from_secs(10);

/// A record in the log.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    pub partition: i32,
    pub offset: i64,
    pub key: Option<Vec<u8>>,
    /// The value; `None` for a tombstone.
    pub value: Option<Vec<u8>>,
    pub headers: Vec<(String, String)>,
    pub timestamp_ms: i64,
}

impl Stored {
    pub fn key(&self) -> &str {
        std::str::from_utf8(self.key.as_deref().unwrap_or_default()).unwrap()
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(self.value.as_deref().unwrap_or_default()).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(self.text()).unwrap()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(header, _)| header == name).map(|(_, value)| value.as_str())
    }
}

/// A Kafka cluster.
#[derive(Clone)]
pub struct Kafka {
    pub brokers: String,
}

impl Kafka {
    pub fn new(brokers: &str) -> Self {
        Self { brokers: brokers.to_owned() }
    }

    fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.brokers).set("group.id", "it-reader").set("log_level", "2");
        config
    }

    fn admin(&self) -> AdminClient<DefaultClientContext> {
        self.client().create().unwrap()
    }

    pub async fn create(&self, topic: &str, partitions: i32) {
        self.create_with(topic, partitions, &[]).await;
    }

    pub async fn create_with(&self, topic: &str, partitions: i32, settings: &[(&str, &str)]) {
        self.create_replicated(topic, partitions, -1, settings).await;
    }

    pub async fn create_replicated(&self, topic: &str, partitions: i32, replicas: i32, settings: &[(&str, &str)]) {
        let mut new = NewTopic::new(topic, partitions, TopicReplication::Fixed(replicas));
        for (name, value) in settings {
            new = new.set(name, value);
        }
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
        let results = self.admin().create_topics([&new], &options).await.unwrap();
        assert!(results.iter().all(Result::is_ok), "{results:?}");
        until(&format!("the brokers know {topic}"), PATIENCE, || async { self.partitions(topic).await }).await;
    }

    /// Returns a setting of a topic, and its source: the topic itself or a default.
    pub async fn setting(&self, topic: &str, name: &str) -> (String, ConfigSource) {
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
        let described = self.admin().describe_configs([&ResourceSpecifier::Topic(topic)], &options).await.unwrap();
        let mut entries = described.into_iter().flat_map(|resource| resource.unwrap().entries);
        let entry = entries.find(|entry| entry.name == name).unwrap();
        (entry.value.unwrap_or_default(), entry.source)
    }

    /// Returns the number of partitions, or `None` if the topic does not exist. Creates no topic.
    pub async fn partitions(&self, topic: &str) -> Option<usize> {
        let (kafka, topic) = (self.clone(), topic.to_owned());
        off_runtime(move || {
            let reader: BaseConsumer = kafka.client().create().unwrap();
            let metadata = reader.fetch_metadata(Some(&topic), PATIENCE).unwrap();
            metadata.topics().first().map(|found| found.partitions().len()).filter(|&count| count > 0)
        })
        .await
    }

    /// Reads all records of a topic, in order within each partition.
    pub async fn read(&self, topic: &str) -> Vec<Stored> {
        let (kafka, topic) = (self.clone(), topic.to_owned());
        off_runtime(move || kafka.read_blocking(&topic)).await
    }

    /// Reads a topic's records once there are this many.
    pub async fn read_at_least(&self, topic: &str, count: usize) -> Vec<Stored> {
        until(&format!("{topic} has {count} records"), PATIENCE, || async {
            Some(self.read(topic).await).filter(|records| records.len() >= count)
        })
        .await
    }

    fn read_blocking(&self, topic: &str) -> Vec<Stored> {
        let mut config = self.client();
        config.set("enable.partition.eof", "false").set("enable.auto.commit", "false").set("fetch.wait.max.ms", "50");
        let reader: BaseConsumer = config.create().unwrap();
        let metadata = reader.fetch_metadata(Some(topic), PATIENCE).unwrap();
        let partitions = metadata.topics()[0].partitions().iter().map(|partition| partition.id());
        let mut wanted = TopicPartitionList::new();
        let mut left = BTreeMap::new();
        for partition in partitions {
            let (low, high) = watermarks(&reader, topic, partition);
            if low < high {
                wanted.add_partition_offset(topic, partition, Offset::Offset(low)).unwrap();
                left.insert(partition, high);
            }
        }
        reader.assign(&wanted).unwrap();
        let (mut records, begun) = (Vec::new(), Instant::now());
        while !left.is_empty() {
            assert!(begun.elapsed() < Duration::from_secs(60), "{topic} cannot be read: {left:?}");
            let Some(Ok(message)) = reader.poll(Duration::from_millis(200)) else { continue };
            if left.get(&message.partition()).is_some_and(|&high| message.offset() + 1 >= high) {
                left.remove(&message.partition());
            }
            records.push(stored(&message));
        }
        records
    }

    /// Writes records without keys as another producer would. All get the same headers.
    pub async fn write(&self, topic: &str, values: &[Option<Vec<u8>>], headers: &[(&str, &str)]) {
        let producer: BaseProducer = self.client().create().unwrap();
        for value in values {
            let headers = headers
                .iter()
                .fold(OwnedHeaders::new(), |headers, (key, value)| headers.insert(Header { key, value: Some(*value) }));
            let mut record = BaseRecord::<[u8], [u8]>::to(topic).headers(headers);
            record.payload = value.as_deref();
            producer.send(record).unwrap();
        }
        off_runtime(move || producer.flush(PATIENCE)).await.unwrap();
    }

    /// Writes records without keys and headers into one partition.
    pub async fn write_in(&self, topic: &str, partition: i32, values: &[Vec<u8>]) {
        let producer: BaseProducer = self.client().create().unwrap();
        for value in values {
            producer.send(BaseRecord::<[u8], [u8]>::to(topic).partition(partition).payload(value)).unwrap();
        }
        off_runtime(move || producer.flush(PATIENCE)).await.unwrap();
    }

    /// Waits until every partition has this many replicas in sync.
    pub async fn await_in_sync(&self, topic: &str, replicas: usize) {
        until(&format!("{topic} has {replicas} replicas in sync"), Duration::from_secs(60), || async {
            let (kafka, topic) = (self.clone(), topic.to_owned());
            let in_sync = off_runtime(move || {
                let reader: BaseConsumer = kafka.client().create().unwrap();
                let Ok(metadata) = reader.fetch_metadata(Some(&topic), PATIENCE) else { return false };
                metadata.topics()[0].partitions().iter().all(|partition| partition.isr().len() == replicas)
            });
            in_sync.await.then_some(())
        })
        .await;
    }

    /// Deletes a topic and waits until the brokers no longer list it.
    pub async fn remove_and_wait(&self, topic: &str) {
        self.admin().delete_topics(&[topic], &AdminOptions::new()).await.unwrap();
        until(&format!("{topic} is gone"), PATIENCE, || async { self.partitions(topic).await.is_none().then_some(()) })
            .await;
    }

    /// Deletes a world's topics without waiting until they are deleted.
    pub fn remove_prefixed(&self, prefix: &str) {
        let kafka = self.clone();
        let prefix = prefix.to_owned();
        // The test is over: if the brokers are stopped by now, their topics are deleted with them.
        let _ = std::thread::spawn(move || kafka.remove(|topic| topic.starts_with(&prefix))).join();
    }

    fn remove(&self, unwanted: impl Fn(&str) -> bool) {
        let reader: BaseConsumer = self.client().create().unwrap();
        let Ok(metadata) = reader.fetch_metadata(None, Duration::from_secs(1)) else { return };
        let topics: Vec<&str> =
            metadata.topics().iter().map(|topic| topic.name()).filter(|name| unwanted(name)).collect();
        if !topics.is_empty() {
            let admin = self.admin();
            let removal = admin.delete_topics(&topics, &AdminOptions::new());
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let _ = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(2), removal).await });
        }
    }
}

fn stored(message: &impl Message) -> Stored {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let headers = message.headers().map(|headers| {
        headers.iter().map(|header| (header.key.to_owned(), text(header.value.unwrap_or_default()))).collect()
    });
    Stored {
        partition: message.partition(),
        offset: message.offset(),
        key: message.key().map(<[u8]>::to_vec),
        value: message.payload().map(<[u8]>::to_vec),
        headers: headers.unwrap_or_default(),
        timestamp_ms: message.timestamp().to_millis().unwrap_or(-1),
    }
}

/// Returns the last value of every key.
pub fn latest(records: &[Stored]) -> BTreeMap<String, Option<Value>> {
    records.iter().map(|record| (record.key().to_owned(), record.value.as_ref().map(|_| record.json()))).collect()
}

/// Deletes topics of test processes that were killed.
pub fn remove_leftovers(brokers: &str) {
    let orphaned = |topic: &str| {
        let process = topic.strip_prefix("it").and_then(|rest| rest.split_once('n')).map(|(process, _)| process);
        process.is_some_and(|id| id.parse::<u32>().is_ok() && !std::path::Path::new("/proc").join(id).exists())
    };
    let kafka = Kafka::new(brokers);
    std::thread::scope(|scope| {
        scope.spawn(|| kafka.remove(orphaned));
    });
}

/// Returns the first and the next offset of a partition. A new partition may have no leader for a
/// moment.
fn watermarks(reader: &BaseConsumer, topic: &str, partition: i32) -> (i64, i64) {
    let begun = Instant::now();
    loop {
        match reader.fetch_watermarks(topic, partition, PATIENCE) {
            Ok(found) => return found,
            Err(error) => assert!(begun.elapsed() < PATIENCE, "{topic}/{partition}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
