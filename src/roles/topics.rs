//! Our own topics, as long as a process runs.

use std::time::Duration;

use super::runtime::Platform;
use crate::platform::{
    drain::Tasks,
    kafka::{Admin, TopicError, TopicSpec, TopicsReady, replication::Watch},
    ops::Check,
};

/// Makes and checks our topics, again and again.
pub(super) fn keep(platform: &Platform, specs: Vec<TopicSpec>, tasks: &mut Tasks) {
    let admin = platform.admin.clone();
    let check = platform.health.check("topics");
    let watch = Watch::new(&platform.settings.kafka, platform.health.check("topic replication"));
    let ready = platform.topics_ready.clone();
    tasks.spawn_forever("topics", async move { look_after(&admin, &specs, &check, watch, &ready).await });
}

/// A topic that is not as it must be keeps the process unready, with what to do in the report; it
/// does not end it, because whoever mends the topic should not have to restart us as well.
/// Looked at again all the time, because partitions can be added while we run.
async fn look_after(admin: &Admin, specs: &[TopicSpec], check: &Check, mut watch: Watch, ready: &TopicsReady) {
    let mut said = String::new();
    loop {
        let pause_ms = match admin.ensure(specs).await {
            Ok(()) => {
                said.clear();
                ready.set(true);
                check.pass();
                watch.compare(admin.replication(specs).await);
                30_000
            }
            // Kafka's own check says so; what was found before still holds.
            Err(errors) if errors.iter().any(TopicError::is_transient) && ready.get() => 3_000,
            Err(errors) => {
                let transient = errors.iter().any(TopicError::is_transient);
                let problem = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
                ready.set(false);
                if !transient && problem != said {
                    tracing::error!(problem, "a topic is not as it must be");
                    said.clone_from(&problem);
                }
                check.fail(problem);
                if transient { 250 } else { 5_000 }
            }
        };
        tokio::time::sleep(Duration::from_millis(pause_ms)).await;
    }
}
