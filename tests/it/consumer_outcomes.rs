//! How the consumer runtime handles each outcome of a record, against a real broker.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use postrider_kafka::{
    Config, DeadLetters,
    batch::Batch,
    consumer::{
        Assignment, BatchHandler, Consumers, Delivery, Failure, Keyed, KeyedHandler, Lag, Outcome, Poison, Span,
        Subscription,
    },
    dead_letter::Reason,
};
use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
    producer::{BaseProducer, BaseRecord, Producer as _},
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::harness::{
    World, member,
    stack::off_runtime,
    wait::{seconds, until, until_now},
};

/// A handler that does what the record's value says.
#[derive(Default)]
struct ScriptedHandler {
    /// Offset, attempt and time of every call.
    calls: Mutex<Vec<(i64, u32, Instant)>>,
    outage: std::sync::atomic::AtomicBool,
}

impl ScriptedHandler {
    fn calls(&self) -> Vec<(i64, u32, Instant)> {
        self.calls.lock().unwrap().clone()
    }

    fn call_count(&self, offset: i64) -> usize {
        self.calls().iter().filter(|call| call.0 == offset).count()
    }

    fn reason(class: &'static str) -> Reason {
        Reason { class, message: format!("{class}, as the record says") }
    }
}

impl KeyedHandler for ScriptedHandler {
    async fn handle(&self, delivery: &Delivery) -> Outcome {
        let record = delivery.record();
        self.calls.lock().unwrap().push((record.offset(), delivery.attempt(), Instant::now()));
        match record.value().unwrap_or_default() {
            b"hang" => std::future::pending().await,
            b"panic" => panic!("as the record says"),
            b"poison" => Outcome::DeadLetter(Self::reason("poison")),
            b"thrice" if delivery.attempt() < 3 => {
                Outcome::RetryAfter(Duration::from_millis(100), Self::reason("transient"))
            }
            b"spent" if delivery.attempt() < 3 => Outcome::RetryAfter(Duration::ZERO, Self::reason("transient")),
            b"spent" => Outcome::DeadLetter(Self::reason("spent")),
            _ if self.outage.load(std::sync::atomic::Ordering::Relaxed) => Outcome::Hold("it is down".to_owned()),
            _ => Outcome::Done,
        }
    }
}

impl BatchHandler for ScriptedHandler {
    type Partition = ();

    async fn assigned(&self, assignment: Assignment) -> Result<((), i64), Failure> {
        Ok(((), assignment.resume()))
    }

    async fn apply(&self, (): &mut (), batch: &Batch) -> Result<Vec<Poison>, Failure> {
        if self.outage.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(Failure::Retry("it is down".to_owned()));
        }
        self.calls.lock().unwrap().extend(batch.iter().map(|record| (record.offset(), 1, Instant::now())));
        let poison = batch.iter().filter(|record| record.value() == Some(b"poison"));
        Ok(poison.map(|record| Poison { offset: record.offset(), reason: Self::reason("poison") }).collect())
    }
}

/// A consumer that runs in this process.
struct Running {
    world: World,
    topic: String,
    group: String,
    consumers: Consumers,
    handler: Arc<ScriptedHandler>,
    task: JoinHandle<Result<(), KafkaError>>,
}

impl Running {
    async fn start(shape: &str, records: &[(&str, &str)]) -> Self {
        Self::start_within(shape, records, Span { records: 1_000, bytes: 1 << 20 }).await
    }

    async fn start_within(shape: &str, records: &[(&str, &str)], span: Span) -> Self {
        let world = World::new().await;
        let topic = world.make_topic("told", 1).await;
        let handler = Arc::<ScriptedHandler>::default();
        write(&world, &topic, records).await;
        let (consumers, task) = consume(&world, &topic, shape, handler.clone(), span).await;
        let group = format!("{topic}-group");
        Self { world, topic, group, consumers, handler, task }
    }

    async fn await_committed(&self, offset: i64) {
        let what = format!("{offset} is committed");
        until(&what, seconds(30), || async { (self.committed().await == offset).then_some(()) }).await;
    }

    async fn committed(&self) -> i64 {
        let (brokers, group, topic) = (self.world.kafka.brokers.clone(), self.group.clone(), self.topic.clone());
        off_runtime(move || {
            let config = ClientConfig::new().set("bootstrap.servers", brokers).set("group.id", group).clone();
            let reader: BaseConsumer = config.create().unwrap();
            let mut wanted = TopicPartitionList::new();
            wanted.add_partition(&topic, 0);
            match reader.committed_offsets(wanted, seconds(10)).unwrap().elements()[0].offset() {
                Offset::Offset(offset) => offset,
                _ => -1,
            }
        })
        .await
    }

    /// Returns the original offset and the error class of each dead letter.
    async fn letters(&self) -> Vec<(String, String)> {
        let letters = self.world.kafka.read(&self.world.topic("letters")).await;
        let header = |letter: &crate::harness::kafka::Stored, name| letter.header(name).unwrap_or("").to_owned();
        letters.iter().map(|letter| (header(letter, "original-offset"), header(letter, "error-class"))).collect()
    }

    fn partition(&self) -> serde_json::Value {
        self.consumers.health.consumers()[0]["partitions"][0].clone()
    }

    async fn stop(self) -> Duration {
        let begun = Instant::now();
        self.consumers.stop.cancel();
        self.task.await.unwrap().unwrap();
        begun.elapsed()
    }
}

async fn write(world: &World, topic: &str, records: &[(&str, &str)]) {
    let records: Vec<(String, String)> =
        records.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let (brokers, topic) = (world.kafka.brokers.clone(), topic.to_owned());
    off_runtime(move || {
        let config = ClientConfig::new().set("bootstrap.servers", brokers).set("enable.idempotence", "true").clone();
        let producer: BaseProducer = config.create().unwrap();
        for (key, value) in &records {
            producer.send(BaseRecord::to(&topic).key(key).payload(value)).map_err(|(error, _)| error).unwrap();
        }
        producer.flush(seconds(20)).unwrap();
    })
    .await;
}

async fn consume(
    world: &World,
    topic: &str,
    shape: &str,
    handler: Arc<ScriptedHandler>,
    span: Span,
) -> (Consumers, JoinHandle<Result<(), KafkaError>>) {
    let mut config = Config { brokers: vec![world.kafka.brokers.clone()], ..Config::default() };
    config.consumer.stall_timeout_ms = 1_000;
    let (consumers, producer) = member::consumers(config, CancellationToken::new());
    let letters = world.topic("letters");
    if world.kafka.partitions(&letters).await.is_none() {
        world.kafka.create(&letters, 1).await;
    }
    let subscription = Subscription {
        name: "told",
        topic: topic.to_owned(),
        group: format!("{topic}-group"),
        max_batch_records: 5,
        max_batch_bytes: 1 << 20,
        dead_letters: DeadLetters::new(producer, letters),
        lag: Lag::default(),
    };
    let (running, batches) = (consumers.clone(), shape == "batch");
    let task = tokio::spawn(async move {
        let keyed = Keyed { concurrency: 8, span };
        if batches {
            running.batches(subscription, handler).await
        } else {
            running.keyed(subscription, keyed, handler).await
        }
    });
    (consumers, task)
}

#[tokio::test]
async fn a_poison_record_is_dead_lettered_once_and_the_other_records_proceed() {
    for shape in ["keyed", "batch"] {
        let running = Running::start(shape, &[("a", "1"), ("a", "poison"), ("a", "2"), ("b", "3")]).await;
        running.await_committed(4).await;
        assert_eq!(running.letters().await, [("1".to_owned(), "poison".to_owned())], "{shape}");
        assert_eq!((running.handler.call_count(1), running.handler.call_count(2)), (1, 1), "{shape}");
        running.stop().await;
    }
}

#[tokio::test]
async fn a_panicking_handler_dead_letters_only_its_record() {
    let running = Running::start("keyed", &[("a", "panic"), ("a", "1")]).await;
    running.await_committed(2).await;
    assert_eq!(running.letters().await, [("0".to_owned(), "panic".to_owned())]);
    running.stop().await;
}

#[tokio::test]
async fn a_retried_record_holds_up_its_key_and_no_other() {
    let running = Running::start("keyed", &[("a", "thrice"), ("a", "1"), ("b", "2"), ("a", "spent"), ("a", "3")]).await;
    running.await_committed(5).await;
    let calls = running.handler.calls();
    let first = |offset: i64| calls.iter().position(|call| call.0 == offset).unwrap();
    let last = |offset: i64| calls.iter().rposition(|call| call.0 == offset).unwrap();
    let attempts = |offset: i64| calls.iter().filter(|call| call.0 == offset).map(|call| call.1).collect::<Vec<_>>();
    assert_eq!((attempts(0), attempts(3)), (vec![1, 2, 3], vec![1, 2, 3]));
    assert!(first(2) < last(0), "b waited for a");
    assert!(last(0) < first(1) && first(1) < first(3) && last(3) < first(4), "a is out of order");
    let times: Vec<Instant> = calls.iter().filter(|call| call.0 == 0).map(|call| call.2).collect();
    let pauses: Vec<Duration> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(pauses.iter().all(|pause| pause.as_millis() >= 100), "{pauses:?}");
    assert_eq!(running.letters().await, [("3".to_owned(), "spent".to_owned())]);
    running.stop().await;
}

#[tokio::test]
async fn records_are_held_while_a_dependency_is_down_and_none_is_lost() {
    for shape in ["keyed", "batch"] {
        let running = Running::start(shape, &[]).await;
        running.handler.outage.store(true, std::sync::atomic::Ordering::Relaxed);
        write(&running.world, &running.topic, &[("a", "1"), ("b", "2")]).await;
        let held = until_now("the holder is reported", seconds(20), || {
            Some(running.partition()["holder"].clone()).filter(|holder| holder["error"] != "" && !holder.is_null())
        })
        .await;
        assert_eq!((&held["offset"], &held["key"]), (&0.into(), &"a".into()), "{shape}: {held}");
        assert!(held["error"].as_str().unwrap().contains("it is down"), "{held}");
        assert!(running.committed().await <= 0, "{shape}");
        running.handler.outage.store(false, std::sync::atomic::Ordering::Relaxed);
        running.await_committed(2).await;
        assert!(running.letters().await.is_empty(), "{shape}");
        running.stop().await;
    }
}

#[tokio::test]
async fn a_hanging_key_does_not_block_other_keys_within_the_span_and_is_reported() {
    let mut records = vec![("stuck", "hang")];
    records.extend((0..200).map(|number| if number % 2 == 0 { ("a", "1") } else { ("b", "2") }));
    let running = Running::start_within("keyed", &records, Span { records: 50, bytes: 1 << 20 }).await;
    let paused = until_now("the partition is paused", seconds(30), || {
        Some(running.partition()).filter(|partition| partition["paused"] == true && !partition["holder"].is_null())
    })
    .await;
    assert_eq!((&paused["holder"]["offset"], &paused["holder"]["key"]), (&0.into(), &"stuck".into()), "{paused}");
    let span = paused["records"].as_u64().unwrap();
    assert!((50..60).contains(&span), "{paused}");
    let done: BTreeMap<i64, u32> = running.handler.calls().iter().map(|call| (call.0, call.1)).collect();
    assert_eq!(done.len() as u64, span, "every record within the span was handled: {done:?}");
    assert!(running.committed().await <= 0, "the commit point passed the hanging record");
    let took = running.stop().await;
    assert!(took >= seconds(5), "stopping waits for records in progress, up to the deadline: {took:?}");
}

#[tokio::test]
async fn a_record_that_hangs_when_its_partition_is_lost_goes_to_the_next_owner() {
    let running = Running::start("keyed", &[("a", "1"), ("stuck", "hang"), ("b", "2")]).await;
    running.await_committed(1).await;
    until_now("the handler has all records", seconds(10), || (running.handler.calls().len() == 3).then_some(())).await;
    let Running { world, topic, consumers, task, .. } = running;
    consumers.stop.cancel();
    task.await.unwrap().unwrap();
    let next = Arc::<ScriptedHandler>::default();
    let (consumers, task) = consume(&world, &topic, "keyed", next.clone(), Span { records: 100, bytes: 1 << 20 }).await;
    let calls = until_now("the next owner has both records", seconds(20), || {
        Some(next.calls()).filter(|calls| calls.len() >= 2)
    })
    .await;
    assert_eq!(
        calls.iter().map(|call| call.0).collect::<Vec<_>>(),
        [1, 2],
        "the next owner resumes at the commit point"
    );
    consumers.stop.cancel();
    task.await.unwrap().unwrap();
}

/// Returns the `silent_seconds` of the consumer's loop.
fn silence_s(consumers: &Consumers) -> f64 {
    consumers.health.liveness().1["loops"]["told"]["silent_seconds"].as_f64().unwrap_or(0.0)
}

#[tokio::test]
async fn a_stalled_handler_fails_liveness_and_a_dependency_outage_does_not() {
    let stuck = Running::start("keyed", &[("a", "hang")]).await;
    until_now("the loop is silent", seconds(30), || (silence_s(&stuck.consumers) > 3.0).then_some(())).await;
    let held = Running::start("keyed", &[]).await;
    held.handler.outage.store(true, std::sync::atomic::Ordering::Relaxed);
    write(&held.world, &held.topic, &[("a", "1")]).await;
    until_now("the record is held for longer than the stall timeout", seconds(30), || {
        (held.partition()["holder"]["held_for_seconds"].as_f64()? > 4.0).then_some(())
    })
    .await;
    assert!(silence_s(&held.consumers) < 1.0, "an outage is not a stall: {}", silence_s(&held.consumers));
    held.stop().await;
    stuck.stop().await;
}
