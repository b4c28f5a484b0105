//! The processor role: every room's projection.

use std::sync::Arc;

use super::runtime::{Platform, SharedRedis};
use crate::{
    kv::{self, Projector},
    platform::{
        drain::Tasks,
        kafka::consumer::{self, Subscription},
    },
};

/// Starts the consumers.
pub(super) fn start(platform: &Arc<Platform>, redis: SharedRedis, tasks: &mut Tasks) -> Result<(), String> {
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
    let epoch = settings.kv.epoch;
    let group = if epoch == 0 { kv::GROUP.to_owned() } else { format!("{}-e{epoch}", kv::GROUP) };
    let subscription = Subscription {
        name: "kv",
        topic: settings.kafka.topic(kv::TOPIC),
        group: settings.kafka.group(&group),
        max_batch_records: settings.kv.batch_records,
        max_batch_bytes: 1 << 20,
    };
    let (config, broker, stop) = (settings.kafka.clone(), platform.broker.clone(), platform.stop.clone());
    let beat = platform.health.beat("kv consumer");
    tasks.spawn("kv consumer", async move {
        consumer::run(&config, broker, subscription, projector, beat, stop).await.map_err(|error| error.to_string())
    });
    Ok(())
}
