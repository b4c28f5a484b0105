//! Reads the commits of the consumer groups.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
};

use super::{
    ledger::{Commit, Ledger, Topic},
    tail::consumer,
};
use crate::harness::World;

const PATIENCE: Duration = Duration::from_secs(5);
/// Time without an answer after which the client is replaced, because it may have forgotten all
/// brokers (librdkafka 5301).
const STUCK: Duration = Duration::from_secs(10);

pub struct Commits(Vec<Group>);

struct Group {
    topic: Topic,
    /// The full name of the topic.
    name: String,
    /// The full name of the group.
    group: String,
    brokers: String,
    wanted: TopicPartitionList,
    client: Mutex<Client>,
}

struct Client {
    consumer: BaseConsumer,
    answered: Instant,
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
            let (brokers, group) = (world.kafka.brokers.clone(), world.topic(group));
            let client = Client { consumer: consumer(&brokers, &group), answered: Instant::now() };
            Group { topic: *topic, name, group, brokers, wanted, client: Mutex::new(client) }
        };
        Self(groups.iter().map(look).collect())
    }

    /// Reads the commits of each group. Leaves out a group whose brokers do not answer.
    pub fn sample(&self, ledger: &Ledger) -> Vec<Commit> {
        let look = |group: &Group| {
            let found = group.ask(|consumer| consumer.committed_offsets(group.wanted.clone(), PATIENCE).ok())?;
            let offset = |offset| match offset {
                Offset::Offset(offset) => Some(offset),
                _ => None,
            };
            let elements = found.elements();
            let offsets = elements.iter().filter_map(|of| Some((of.partition(), offset(of.offset())?))).collect();
            let deliveries = ledger.evidence().deliveries.len();
            let (topic, at_ms, reached) = (group.topic, ledger.now_ms(), BTreeMap::new());
            Some(Commit { topic, at_ms, offsets, reached, deliveries })
        };
        self.0.iter().filter_map(look).collect()
    }

    /// Reads the end offsets of the groups' topics.
    pub fn ends(&self) -> Option<BTreeMap<Topic, BTreeMap<i32, i64>>> {
        let mut ends: BTreeMap<Topic, BTreeMap<i32, i64>> = BTreeMap::new();
        for group in &self.0 {
            for partition in group.wanted.elements().iter().map(|of| of.partition()) {
                let end = |consumer: &BaseConsumer| consumer.fetch_watermarks(&group.name, partition, PATIENCE).ok();
                ends.entry(group.topic).or_default().insert(partition, group.ask(end)?.1);
            }
        }
        Some(ends)
    }
}

impl Group {
    fn client(&self) -> MutexGuard<'_, Client> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the brokers; replaces the client if it has had no answer for too long.
    fn ask<T>(&self, question: impl Fn(&BaseConsumer) -> Option<T>) -> Option<T> {
        let mut client = self.client();
        let answer = question(&client.consumer);
        if answer.is_some() {
            client.answered = Instant::now();
        } else if client.answered.elapsed() > STUCK {
            let next = Client { consumer: consumer(&self.brokers, &self.group), answered: Instant::now() };
            let old = std::mem::replace(&mut *client, next);
            // Dropping a client may take a while.
            std::thread::spawn(move || drop(old));
        }
        answer
    }
}
