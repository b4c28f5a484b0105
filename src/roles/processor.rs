//! The processor role: runs the projection of every capability.

use std::{sync::Arc, time::Duration};

use postrider_comments as comments;
use postrider_dlq as dlq;
use postrider_feed as feed;
use postrider_kafka::{
    DeadLetters,
    consumer::{BatchHandler, Lag, Subscription},
};
use postrider_kv::Projector;
use postrider_messages as messages;
use postrider_process::drain::{Tasks, time_over};
use postrider_projection::Projection;
use tokio::sync::Notify;

use super::{
    platform::{Platform, SharedRedis},
    settings::ConsumerPlan,
};

/// Time after the stop within which the message store has to finish. Consumers leave their groups
/// earlier.
const STORE_DEADLINE: Duration = Duration::from_secs(12);

/// Starts the projections and their background tasks.
pub(super) fn start(platform: &Arc<Platform>, redis: SharedRedis, tasks: &mut Tasks) {
    project_kv(platform, redis.clone(), tasks);
    project_comments(platform, redis.clone(), tasks);
    project_messages(platform, redis.clone(), tasks);
    project_feed(platform, redis, tasks);
}

fn project_kv(platform: &Platform, redis: SharedRedis, tasks: &mut Tasks) {
    let settings = &platform.settings;
    let projector = Projector::new(
        settings.kv.clone(),
        &settings.kafka,
        &settings.redis.key_prefix,
        redis,
        platform.producer.clone(),
        platform.broker.clone(),
        platform.health.check("kv view"),
    );
    let subscription = subscription(platform, ConsumerPlan::kv(settings), settings.kv.batch_records);
    consume("kv consumer", platform, subscription, projector, tasks);
}

fn project_comments(platform: &Platform, redis: SharedRedis, tasks: &mut Tasks) {
    let settings = &platform.settings;
    let Some(pool) = platform.postgres.clone() else {
        tracing::warn!("`postgres.url` is not set, comments are not stored");
        return;
    };
    let projector = comments::Projector::new(settings.comments.clone(), pool);
    let subscription = subscription(platform, ConsumerPlan::comments(settings), settings.comments.batch_records);
    let notifications = projector.clone().hint_forever(redis, settings.redis.key_prefix.clone());
    tasks.spawn_forever("comments notifications", notifications);
    let projection = Projection::new(projector, platform.health.check("comments"));
    consume("comments consumer", platform, subscription, projection, tasks);
}

fn project_messages(platform: &Platform, redis: SharedRedis, tasks: &mut Tasks) {
    let settings = &platform.settings;
    let Some(pool) = platform.postgres.clone() else {
        tracing::warn!("`postgres.url` is not set, messages are not stored or delivered");
        return;
    };
    let publisher = messages::Publisher::new(settings.redis.key_prefix.clone());
    tasks.spawn_forever("messages notifications", publisher.clone().run(redis));
    tasks.spawn_forever("messages upkeep", messages::keep_partitions(pool.clone(), settings.messages.retention_days));
    let undelivered = messages::Undelivered::new(
        &settings.messages,
        &settings.kafka,
        pool.clone(),
        platform.producer.clone(),
        platform.topics_ready.clone(),
    );
    tasks.spawn_infallible("undelivered messages", undelivered.run(platform.stop.clone()));
    let (projector, writer) = messages::Projector::new(&settings.messages, pool, publisher);
    let stop = platform.stop.clone();
    tasks.spawn_infallible("messages store", async move {
        // Unstored messages are not committed either; the next owner of the partition reads them
        // again.
        tokio::select! {
            () = writer.until_closed() => {}
            () = time_over(&stop, STORE_DEADLINE) => tracing::warn!("message store did not stop in time"),
        }
    });
    let projection = Projection::new(projector, platform.health.check("messages"));
    let subscription = subscription(platform, ConsumerPlan::messages(settings), settings.messages.batch_records);
    consume("messages consumer", platform, subscription, projection, tasks);
}

fn project_feed(platform: &Platform, redis: SharedRedis, tasks: &mut Tasks) {
    let settings = &platform.settings;
    let Some(pool) = platform.postgres.clone() else { return };
    let (config, wake) = (settings.feed.clone(), Arc::<Notify>::default());
    let timelines = feed::TimelineWriter::new(pool.clone(), &settings.redis.key_prefix, redis, config.timeline_ids);
    tasks.spawn_forever("feed timelines", timelines.clone().keep_forever());
    tasks.spawn_forever("feed memory", feed::keep_memory(pool.clone(), config.memory_days));
    tasks.spawn_forever("feed jobs count", feed::count_jobs(pool.clone()));
    let trimmer = feed::Trimmer::new(pool.clone(), config.clone());
    tasks.spawn_forever("feed trimming", trimmer.run());
    let jobs = feed::Jobs::new(config.clone(), pool.clone(), timelines.clone(), wake.clone(), platform.stop.clone());
    tasks.spawn("feed jobs", jobs.run());
    let projection =
        Projection::new(feed::Projector::new(config, pool, timelines, wake), platform.health.check("feed"));
    let subscription = subscription(platform, ConsumerPlan::feed(settings), settings.feed.batch_records);
    consume("feed consumer", platform, subscription, projection, tasks);
}

fn dead_letters(platform: &Platform) -> DeadLetters {
    DeadLetters::new(platform.producer.clone(), platform.settings.kafka.topic(dlq::EVENTS_TOPIC))
}

/// Subscribes a capability to its topic, with batches of at most 1 MiB.
fn subscription(platform: &Platform, plan: ConsumerPlan, max_batch_records: usize) -> Subscription {
    Subscription {
        name: plan.name,
        topic: plan.topic,
        group: plan.group,
        max_batch_records,
        max_batch_bytes: 1 << 20,
        dead_letters: dead_letters(platform),
        lag: Lag::default(),
    }
}

fn consume<H: BatchHandler>(
    name: &'static str,
    platform: &Platform,
    subscription: Subscription,
    handler: Arc<H>,
    tasks: &mut Tasks,
) {
    let consumers = platform.consumers();
    tasks.spawn(name, async move { consumers.batches(subscription, handler).await });
}
