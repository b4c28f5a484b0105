//! The consumer runtime against real brokers: members that join, leave, freeze and crash, and a
//! broker that restarts.

use std::{collections::BTreeMap, time::Duration};

use rdkafka::{
    ClientConfig,
    producer::{BaseProducer, BaseRecord, Producer as _},
};

use crate::harness::{
    Stack, World,
    member::{Group, faults, live},
    stack::off_runtime,
    wait::seconds,
};

/// Runs a member of a group. Not a test by itself: the others start it as a child process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs a member for the other tests"]
async fn a_member() {
    live().await;
}

/// Writes `count` records with the keys from `key`, and returns the end offset of each partition.
async fn fill(
    brokers: &str,
    topic: &str,
    count: usize,
    key: fn(usize) -> String,
    pause_every: Option<usize>,
) -> BTreeMap<i32, i64> {
    let (brokers, topic) = (brokers.to_owned(), topic.to_owned());
    off_runtime(move || {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &brokers).set("enable.idempotence", "true").set("linger.ms", "2");
        let producer: BaseProducer = config.set("partitioner", "murmur2_random").create().unwrap();
        for number in 0..count {
            let (key, value) = (key(number), number.to_string());
            producer.send(BaseRecord::to(&topic).key(&key).payload(&value)).map_err(|(error, _)| error).unwrap();
            if pause_every.is_some_and(|every| number % every == 0) {
                producer.poll(Duration::from_millis(1));
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        producer.flush(seconds(180)).unwrap();
        let metadata = producer.client().fetch_metadata(Some(&topic), seconds(10)).unwrap();
        let partitions = metadata.topics()[0].partitions().iter().map(|partition| partition.id());
        let end = |id| (id, producer.client().fetch_watermarks(&topic, id, seconds(10)).unwrap().1);
        partitions.map(end).collect()
    })
    .await
}

fn one_of_fifty(number: usize) -> String {
    format!("k{}", number * 7 % 50)
}

fn mostly_one(number: usize) -> String {
    if number.is_multiple_of(10) { format!("k{}", number / 10 % 40) } else { "hot".to_owned() }
}

/// Members join, leave, crash and freeze while records arrive.
async fn churn(shape: &'static str, protocol: &'static str) {
    const COUNT: usize = 12_000;
    let world = World::new().await;
    let topic = world.make_topic("turmoil", 6).await;
    let group = Group::new(&world, &topic, shape, protocol);
    let (brokers, filled) = (world.kafka.brokers.clone(), topic.clone());
    let filling = tokio::spawn(async move { fill(&brokers, &filled, COUNT, one_of_fifty, Some(8)).await });
    let first = group.spawn();
    group.await_done(300, seconds(120)).await;
    let (second, third) = (group.spawn(), group.spawn());
    let count = group.await_done(1_500, seconds(120)).await.len();
    first.leave().await;
    group.await_done(count + 500, seconds(120)).await;
    second.kill();
    let fourth = group.spawn();
    // Longer than the session: its partitions go to the fourth member, and when it resumes it is no
    // longer in the group.
    third.pause();
    let ends = filling.await.unwrap();
    tokio::time::sleep(seconds(12)).await;
    third.resume();
    let ledger = group.await_done(COUNT, seconds(180)).await;
    assert_eq!(ends.values().sum::<i64>(), COUNT as i64);
    assert_eq!(faults(&ledger, &ends), Vec::<String>::new());
    third.leave().await;
    fourth.leave().await;
    // The members that left have committed everything, so no work is left.
    let before = group.ledger().len();
    let last = group.spawn();
    let more = fill(&world.kafka.brokers, &topic, 50, one_of_fifty, None).await;
    let ledger = group.await_done(COUNT + 50, seconds(120)).await;
    assert_eq!(faults(&ledger, &more), Vec::<String>::new());
    assert_eq!(group.ledger().len(), before + 50, "a committed record was delivered again");
    last.leave().await;
}

#[tokio::test]
async fn keyed_members_join_leave_crash_and_freeze_without_loss_or_reordering() {
    churn("keyed", "consumer").await;
}

#[tokio::test]
async fn keyed_members_of_a_classic_group_join_leave_crash_and_freeze_without_loss_or_reordering() {
    churn("keyed", "classic").await;
}

#[tokio::test]
async fn batch_members_join_leave_crash_and_freeze_without_loss_or_reordering() {
    churn("batch", "consumer").await;
}

#[tokio::test]
async fn a_broker_that_is_bounced_costs_no_record_and_no_order() {
    const COUNT: usize = 4_000;
    let stack = Stack::own("consumers", &["--only", "kafka"]).await;
    let world = World::on(&stack).await;
    let topic = world.make_topic("bounced", 4).await;
    let ends = fill(&world.kafka.brokers, &topic, COUNT, one_of_fifty, None).await;
    let groups = ["keyed", "batch"].map(|shape| Group::new(&world, &topic, shape, "consumer"));
    let members = groups.each_ref().map(Group::spawn);
    groups[0].await_done(200, seconds(120)).await;
    stack.ctl(&["kill", "kafka"]).await;
    stack.ctl(&["start", "kafka"]).await;
    for group in &groups {
        let ledger = group.await_done(COUNT, seconds(180)).await;
        assert_eq!(faults(&ledger, &ends), Vec::<String>::new(), "{}", group.shape);
    }
    for member in members {
        member.leave().await;
    }
}

#[tokio::test]
async fn fifty_partitions_and_a_key_with_most_of_the_traffic_are_shared_by_two_members() {
    const COUNT: usize = 6_000;
    let world = World::new().await;
    let topic = world.make_topic("fifty", 50).await;
    let ends = fill(&world.kafka.brokers, &topic, COUNT, mostly_one, None).await;
    let group = Group::new(&world, &topic, "keyed", "consumer");
    let members = [group.spawn(), group.spawn()];
    let ledger = group.await_done(COUNT, seconds(180)).await;
    assert_eq!(faults(&ledger, &ends), Vec::<String>::new());
    for member in members {
        member.leave().await;
    }
}

/// Parses the partitions in a line of a member's log, as in `partitions=[3, 4]`.
fn partitions_in(line: &str) -> Vec<i32> {
    let (_, rest) = line.split_once("partitions=[").unwrap();
    let (list, _) = rest.split_once(']').unwrap();
    list.split(", ").map(|number| number.parse().unwrap()).collect()
}

#[tokio::test]
async fn a_rebalance_does_not_revoke_partitions_that_stay_assigned() {
    let world = World::new().await;
    let topic = world.make_topic("moving", 8).await;
    let group = Group::new(&world, &topic, "keyed", "consumer");
    let (brokers, filled) = (world.kafka.brokers.clone(), topic.clone());
    let filling = tokio::spawn(async move { fill(&brokers, &filled, 16_000, one_of_fifty, Some(16)).await });
    let first = group.spawn();
    group.await_done(1_000, seconds(120)).await;
    let second = group.spawn();
    let id = second.id();
    crate::harness::wait::until_now("the second member finishes a record", seconds(20), || {
        group.ledger().iter().any(|done| done.member == id).then_some(())
    })
    .await;
    filling.await.unwrap();
    let ledger = group.await_done(16_000, seconds(180)).await;
    let handled =
        |member: u32, partition: i32| ledger.iter().any(|done| (done.member, done.partition) == (member, partition));
    let stayed: Vec<i32> =
        (0..8).filter(|&partition| handled(first.id(), partition) && !handled(id, partition)).collect();
    assert!(!stayed.is_empty() && stayed.len() < 8, "{stayed:?} stayed");
    // These partitions were never revoked. `bench/run relay` measures for how long they receive no
    // new records.
    let log = first.log();
    let revocations: Vec<&str> = log.lines().filter(|line| line.contains("partitions revoked")).collect();
    assert!(!revocations.is_empty(), "{log}");
    for partition in stayed {
        let revoked = |line: &&&str| partitions_in(line).contains(&partition);
        assert_eq!(revocations.iter().find(revoked), None, "partition {partition}");
    }
    first.leave().await;
    second.leave().await;
}
