//! A member that its group has expelled without notifying it rejoins when no member reads its
//! partitions. So does a member when no member reads a partition beside its own. An owner whose
//! records wait for a dependency shows that it is alive.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use postrider_kafka::{
    Config, DeadLetters, GroupProtocol,
    batch::Batch,
    consumer::{Assignment, BatchHandler, Failure, Lag, Poison, Subscription},
};
use rdkafka::{
    ClientConfig, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::KafkaError,
    producer::{BaseProducer, BaseRecord, Producer as _},
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::harness::{
    Stack, World,
    heartbeat_proxy::HeartbeatProxy,
    member,
    stack::off_runtime,
    wait::{seconds, until, until_now},
};

/// The id of the client that is expelled.
const EXPELLED: &str = "expelled";
/// Heartbeats to answer until a session is over: they come every 1.5 s at most, and a session lasts
/// 6 s.
const SESSION_HEARTBEATS: usize = 14;

/// A handler that counts records.
#[derive(Default)]
struct Counter {
    records: AtomicUsize,
    /// Number of partition assignments; a partition counts each time it is assigned.
    assigned: AtomicUsize,
    panics: bool,
    /// Number of records after which every batch fails, as while a dependency is down; `None` is
    /// never.
    held_after: Option<usize>,
}

impl Counter {
    async fn await_records(&self, count: usize) {
        let what = format!("{count} records are done");
        until_now(&what, seconds(200), || (self.records.load(Ordering::Relaxed) >= count).then_some(())).await;
    }
}

impl BatchHandler for Counter {
    type Partition = ();

    async fn assigned(&self, assignment: Assignment) -> Result<((), i64), Failure> {
        assert!(!self.panics, "panics as the test asks");
        self.assigned.fetch_add(1, Ordering::Relaxed);
        Ok(((), assignment.resume()))
    }

    async fn apply(&self, (): &mut (), batch: &Batch) -> Result<Vec<Poison>, Failure> {
        if self.held_after.is_some_and(|records| self.records.load(Ordering::Relaxed) >= records) {
            return Err(Failure::Retry("a dependency is down".to_owned()));
        }
        self.records.fetch_add(batch.len(), Ordering::Relaxed);
        Ok(Vec::new())
    }
}

/// A consumer that runs in this process.
struct Consumer {
    counter: Arc<Counter>,
    stop: CancellationToken,
    task: JoinHandle<Result<(), KafkaError>>,
}

impl Consumer {
    fn start(world: &World, topic: &str, protocol: GroupProtocol, client: &str, counter: Counter) -> Self {
        let mut config = Config { brokers: vec![world.kafka.brokers.clone()], ..Config::default() };
        config.consumer.session_timeout_ms = 6_000;
        config.consumer.group_protocol = protocol;
        config.properties = [("client.id".to_owned(), client.to_owned())].into_iter().collect();
        let (stop, counter) = (CancellationToken::new(), Arc::new(counter));
        let (consumers, producer) = member::consumers(config, stop.clone());
        let subscription = Subscription {
            name: "counter",
            topic: topic.to_owned(),
            group: format!("{topic}-{protocol:?}"),
            max_batch_records: 50,
            max_batch_bytes: 1 << 20,
            dead_letters: DeadLetters::new(producer, format!("{topic}-letters")),
            lag: Lag::default(),
        };
        let handler = counter.clone();
        let task = tokio::spawn(async move { consumers.batches(subscription, handler).await });
        Self { counter, stop, task }
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }
}

async fn write(world: &World, topic: &str, count: usize) {
    let (brokers, topic) = (world.kafka.brokers.clone(), topic.to_owned());
    off_runtime(move || {
        let producer: BaseProducer = ClientConfig::new().set("bootstrap.servers", brokers).create().unwrap();
        for _ in 0..count {
            producer.send(BaseRecord::<(), _>::to(&topic).payload("x")).map_err(|(error, _)| error).unwrap();
        }
        producer.flush(seconds(20)).unwrap();
    })
    .await;
}

async fn expel_member(protocol: GroupProtocol) {
    let proxy = HeartbeatProxy::start(EXPELLED).await;
    let advertised = format!("advertised.listeners=PLAINTEXT://{}", proxy.address);
    let session = "group.consumer.session.timeout.ms=6000";
    let options = ["--only", "kafka", "--kafka-config", &advertised, "--kafka-config", session];
    let stack = Stack::behind(&format!("expelled-{protocol:?}"), &options, |upstream| proxy.lead_to(upstream)).await;
    let mut world = World::on(&stack).await;
    world.kafka.brokers = proxy.address.to_string();
    let topic = world.make_topic("orders", 1).await;
    write(&world, &topic, 5).await;
    let first = Consumer::start(&world, &topic, protocol, "first", Counter::default());
    first.counter.await_records(5).await;
    let expelled = Consumer::start(&world, &topic, protocol, EXPELLED, Counter::default());
    until_now("the second consumer is a member without a partition", seconds(60), || {
        (proxy.carried() >= 3).then_some(())
    })
    .await;
    until_now("its session has expired", seconds(120), || {
        // Repeated, because the client may have opened a new connection meanwhile.
        proxy.lie();
        (proxy.answered() >= SESSION_HEARTBEATS).then_some(())
    })
    .await;
    first.stop().await;
    // No member is left that could commit or read these records.
    write(&world, &topic, 7).await;
    expelled.counter.await_records(7).await;
    expelled.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expelled_member_rejoins_when_no_member_reads_its_partition() {
    expel_member(GroupProtocol::Consumer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expelled_member_of_a_classic_group_rejoins_when_no_member_reads_its_partition() {
    expel_member(GroupProtocol::Classic).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_is_read_although_the_answer_with_its_committed_offset_is_lost() {
    let proxy = HeartbeatProxy::start(EXPELLED).await;
    let advertised = format!("advertised.listeners=PLAINTEXT://{}", proxy.address);
    let options = ["--only", "kafka", "--kafka-config", &advertised];
    let stack = Stack::behind("lost-commits", &options, |upstream| proxy.lead_to(upstream)).await;
    let mut world = World::on(&stack).await;
    world.kafka.brokers = proxy.address.to_string();
    let topic = world.make_topic("orders", 1).await;
    write(&world, &topic, 5).await;
    proxy.lose_commits();
    let consumer = Consumer::start(&world, &topic, GroupProtocol::Consumer, EXPELLED, Counter::default());
    // librdkafka itself retries only after a minute.
    let what = "the records are read";
    until_now(what, seconds(40), || (consumer.counter.records.load(Ordering::Relaxed) == 5).then_some(())).await;
    assert!(proxy.has_lost_commits());
    consumer.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_whose_partition_task_dies_ends_with_an_error() {
    let world = World::new().await;
    let topic = world.make_topic("orders", 1).await;
    write(&world, &topic, 1).await;
    let counter = Counter { panics: true, ..Counter::default() };
    let consumer = Consumer::start(&world, &topic, GroupProtocol::Consumer, "broken", counter);
    let ended = tokio::time::timeout(seconds(60), consumer.task).await.expect("the consumer ends by itself").unwrap();
    assert!(ended.is_err());
}

/// Returns the metadata of the group's commit of partition 0.
async fn commit_metadata(world: &World, topic: &str, group: String) -> Option<String> {
    let (brokers, topic) = (world.kafka.brokers.clone(), topic.to_owned());
    off_runtime(move || {
        let mut config = ClientConfig::new();
        let client: BaseConsumer =
            config.set("bootstrap.servers", brokers).set("group.id", group).create().expect("a client");
        let mut list = TopicPartitionList::new();
        list.add_partition(&topic, 0);
        let found = client.committed_offsets(list, seconds(5)).ok()?;
        found.elements().first().map(|element| element.metadata().to_owned())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_held_up_by_a_dependency_commits_the_same_offset_with_a_later_time() {
    let world = World::new().await;
    let topic = world.make_topic("orders", 1).await;
    write(&world, &topic, 5).await;
    let counter = Counter { held_after: Some(5), ..Counter::default() };
    let held = Consumer::start(&world, &topic, GroupProtocol::Consumer, "held", counter);
    held.counter.await_records(5).await;
    write(&world, &topic, 1).await;
    let time = || async {
        let metadata = commit_metadata(&world, &topic, format!("{topic}-Consumer")).await?;
        metadata.parse::<i64>().ok()
    };
    let first = until("the commit has a time", seconds(60), time).await;
    until("the commit has a later time", seconds(60), || async { time().await.filter(|&later| later > first) }).await;
    held.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_rejoins_when_nobody_reads_a_partition_beside_its_own() {
    let world = World::new().await;
    let topic = world.make_topic("orders", 2).await;
    let group = format!("{topic}-Consumer");
    // A member that accepts its partition and commits nothing, like one whose assignment got lost.
    let (brokers, rogue_topic, stop) = (world.kafka.brokers.clone(), topic.clone(), CancellationToken::new());
    let (stopped, reads) = (stop.clone(), Arc::<AtomicUsize>::default());
    let counted = reads.clone();
    let rogue = std::thread::spawn(move || {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", brokers).set("group.id", group).set("group.protocol", "consumer");
        let client: BaseConsumer = config.set("enable.auto.commit", "false").create().expect("a client");
        client.subscribe(&[&rogue_topic]).unwrap();
        while !stopped.is_cancelled() {
            if let Some(Ok(_)) = client.poll(std::time::Duration::from_millis(100)) {
                counted.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    let member = Consumer::start(&world, &topic, GroupProtocol::Consumer, "member", Counter::default());
    let assigned = || member.counter.assigned.load(Ordering::Relaxed);
    until_now("the member has its partition", seconds(60), || (assigned() > 0).then_some(())).await;
    // So many batches that both partitions get records.
    for _ in 0..20 {
        write(&world, &topic, 5).await;
    }
    let has_read = || (reads.load(Ordering::Relaxed) > 0).then_some(());
    until_now("the other one has its partition", seconds(60), has_read).await;
    let before = assigned();
    until_now("the member has rejoined", seconds(200), || (assigned() > before).then_some(())).await;
    stop.cancel();
    off_runtime(move || rogue.join().unwrap()).await;
    member.counter.await_records(100).await;
    member.stop().await;
}
