//! Writes records as other producers do.

use std::time::Duration;

use rdkafka::{
    ClientConfig,
    message::{Header, OwnedHeaders},
    producer::{BaseProducer, BaseRecord, Producer},
};

use super::stack::off_runtime;

/// One record to write.
#[derive(Debug, Clone, Default)]
pub struct Write {
    pub partition: Option<i32>,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub headers: Vec<(&'static str, String)>,
    pub timestamp_ms: Option<i64>,
}

/// Returns a record with a key and a text value.
pub fn keyed(key: &str, value: impl ToString) -> Write {
    Write { key: Some(key.into()), value: Some(value.to_string().into()), ..Write::default() }
}

/// Writes the records in this order and waits until all of them are stored.
pub async fn produce(brokers: &str, topic: &str, records: Vec<Write>) {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("partitioner", "murmur2_random")
        .set("queue.buffering.max.messages", "1000000");
    let (producer, topic): (BaseProducer, String) = (config.create().unwrap(), topic.to_owned());
    off_runtime(move || {
        for write in &records {
            let headers = write.headers.iter().fold(OwnedHeaders::new(), |headers, (key, value)| {
                headers.insert(Header { key, value: Some(value.as_str()) })
            });
            let mut record = BaseRecord::<[u8], [u8]>::to(&topic).headers(headers);
            (record.key, record.payload) = (write.key.as_deref(), write.value.as_deref());
            (record.partition, record.timestamp) = (write.partition, write.timestamp_ms);
            producer.send(record).unwrap();
        }
        producer.flush(Duration::from_secs(30)).unwrap();
    })
    .await;
}
