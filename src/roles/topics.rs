//! Creates and checks postrider's own topics while a process runs.

use std::time::Duration;

use postrider_health::Check;
use postrider_kafka::{Admin, TopicError, TopicSpec, TopicsReady, replication::Watch};
use postrider_process::drain::Tasks;

use super::platform::Platform;

/// Starts the task that creates and checks the topics.
pub(super) fn keep(platform: &Platform, specs: Vec<TopicSpec>, tasks: &mut Tasks) {
    let admin = platform.admin.clone();
    let check = platform.health.check("topics");
    let watch = Watch::new(&platform.settings.kafka, platform.health.check("topic replication"));
    let ready = platform.topics_ready.clone();
    tasks.spawn_forever("topics", async move { maintain(&admin, &specs, &check, watch, &ready).await });
}

/// Creates missing topics and checks the settings of all, repeatedly, because partitions can be
/// added at any time. A topic with wrong settings makes the process unready and the readiness
/// report says what to do. The process keeps running, so fixing the topic needs no restart.
async fn maintain(admin: &Admin, specs: &[TopicSpec], check: &Check, mut watch: Watch, ready: &TopicsReady) {
    let mut logged = String::new();
    loop {
        let pause_ms = match admin.ensure(specs).await {
            Ok(()) => {
                logged.clear();
                ready.set(true);
                check.pass();
                watch.compare(admin.replication(specs).await);
                30_000
            }
            // Kafka is away; its own check reports that, and the last result still holds.
            Err(errors) if errors.iter().any(TopicError::is_transient) && ready.get() => 3_000,
            Err(errors) => {
                let transient = errors.iter().any(TopicError::is_transient);
                let problem = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
                ready.set(false);
                if !transient && problem != logged {
                    tracing::error!(problem, "topic check failed");
                    logged.clone_from(&problem);
                }
                check.fail(problem);
                if transient { 250 } else { 5_000 }
            }
        };
        tokio::time::sleep(Duration::from_millis(pause_ms)).await;
    }
}
