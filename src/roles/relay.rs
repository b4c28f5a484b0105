//! The relay role: drains the outbox to Kafka and delivers topics to HTTP endpoints. The command
//! `relay` delivers one topic without a configuration file.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use postrider_dlq as dlq;
use postrider_feed as feed;
use postrider_gateway::relay::{self as gateway, Access, Problem, Route};
use postrider_health::Check;
use postrider_kafka::{
    Config, DeadLetters,
    committed::Commits,
    consumer::{self, Consumers, Keyed, Lag, Subscription},
    reach,
    scan::Span,
};
use postrider_outbox as outbox;
use postrider_process::drain::Tasks;
use postrider_time::backoff::Backoff;
use tokio::sync::oneshot;

use super::{
    platform::{Platform, RelayCommand},
    progress,
    settings::ConsumerPlan,
};

/// Limits how far a partition may read past a record that is being retried.
const SPAN: consumer::Span = consumer::Span { records: 10_000, bytes: 16 << 20 };

/// Maximum wait for the dead-letter topic. If it cannot be created, delivery starts anyway: records
/// that the target accepts flow, records that it rejects are held.
const TOPICS_TIMEOUT: Duration = Duration::from_secs(10);

/// Time after which the command says that Kafka does not answer.
const KAFKA_TIMEOUT: Duration = Duration::from_secs(3);

/// Wait between lookups of the group's commits by a command that ends. A long run looks less often.
const COMMIT_LOOKUPS: Backoff = Backoff::doubling(Duration::from_millis(250), Duration::from_secs(2));

/// Problem that keeps a route from starting.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    #[error("`gateway.relays`: the name or group of `{name}` is used twice; make it unique")]
    Duplicate { name: String },
    #[error(transparent)]
    Route(#[from] Problem),
}

/// Starts the outbox drain and every configured route.
pub(super) fn start(platform: &Arc<Platform>, tasks: &mut Tasks) -> Result<(), CheckError> {
    let relays = &platform.settings.gateway.relays;
    drain_outbox(platform, tasks);
    if relays.is_empty() {
        let stop = platform.stop.clone();
        tasks.spawn_infallible("relay", stop.cancelled_owned());
    }
    check_names(relays)?;
    for config in relays {
        start_route(platform, config, Access::Public, ConsumerPlan::relay(&platform.settings, config), tasks)?;
    }
    Ok(())
}

fn check_names(relays: &[gateway::Config]) -> Result<(), CheckError> {
    let (mut names, mut groups) = (HashSet::new(), HashSet::new());
    for config in relays {
        if !names.insert(config.name.as_str()) || !groups.insert(config.group()) {
            return Err(CheckError::Duplicate { name: config.name.clone() });
        }
    }
    Ok(())
}

/// Returns the problem that would keep the configured routes from starting.
pub(super) fn check(relays: &[gateway::Config]) -> Result<(), CheckError> {
    check_names(relays)?;
    Ok(relays.iter().try_for_each(|config| Route::check(config, Access::Public))?)
}

/// Starts the outbox drain, if Postgres is configured.
fn drain_outbox(platform: &Arc<Platform>, tasks: &mut Tasks) {
    let Some(pool) = platform.postgres.clone() else { return };
    let drain = outbox::Drain::new(
        pool,
        platform.producer.clone(),
        &platform.settings.kafka,
        vec![outbox::Topic { name: feed::TOPIC, value: feed::with_number }],
        platform.topics_ready.clone(),
        platform.health.check("outbox"),
        platform.stop.clone(),
    );
    tasks.spawn_forever("outbox notifications", drain.clone().listen_forever());
    tasks.spawn_infallible("outbox", drain.run());
}

/// Starts the one route of the command `relay`.
pub(super) fn start_command(
    platform: &Arc<Platform>,
    command: &RelayCommand,
    tasks: &mut Tasks,
) -> Result<(), CheckError> {
    let access = if command.public_only { Access::Public } else { Access::Any };
    // Takes the group name as given, without the configured prefix.
    let plan = ConsumerPlan::of_relay(&command.route, command.route.group());
    let (topic, group) = (plan.topic.clone(), plan.group.clone());
    let (route, lag) = start_route(platform, &command.route, access, plan, tasks)?;
    let (kafka, origin) = (platform.settings.kafka.clone(), command.brokers_origin.clone());
    tasks.spawn_forever("kafka check", async move {
        if let Err(error) = reach::check(&kafka, &origin, KAFKA_TIMEOUT).await {
            tracing::error!(%error, "waiting for kafka");
        }
        std::future::pending().await
    });
    // Set only here, once per command.
    let _ = command.started.set(route.clone());
    tasks.spawn_forever("progress", progress::show(route, lag));
    if let Some(spans) = command.until.clone() {
        let (kafka, finished) = (platform.settings.kafka.clone(), platform.finished.clone());
        tasks.spawn_forever("end of the records", async move {
            until_committed(kafka, topic, group, spans).await;
            finished.cancel();
            std::future::pending().await
        });
    }
    Ok(())
}

/// Waits until the group has committed every record of these spans.
async fn until_committed(kafka: Config, topic: String, group: String, spans: Vec<Span>) {
    let (ended, end) = oneshot::channel();
    // The client blocks, and a thread keeps it from look to look. It ends with the process.
    std::thread::spawn(move || {
        watch_commits(&kafka, &topic, &group, &spans, &ended);
        let _ = ended.send(());
    });
    if end.await.is_err() {
        std::future::pending().await
    }
}

/// Looks at the commits until the group has passed these spans, or nobody waits for that.
fn watch_commits(kafka: &Config, topic: &str, group: &str, spans: &[Span], ended: &oneshot::Sender<()>) {
    let (mut commits, mut looks, mut warned) = (None, 0, false);
    while !ended.is_closed() {
        let looked = match commits.take().map_or_else(|| Commits::connect(kafka, topic, group), Ok) {
            Ok(client) => commits.insert(client).have_passed(spans),
            Err(error) => Err(error.into()),
        };
        match looked {
            Ok(true) => return,
            Ok(false) => warned = false,
            Err(error) if warned => tracing::debug!(%error, "looking up the group's commits failed"),
            Err(error) => {
                tracing::warn!(%error, topic, group, "looking up the group's commits failed, repeating it");
                warned = true;
            }
        }
        looks += 1;
        std::thread::sleep(COMMIT_LOOKUPS.delay(looks, 0.0));
    }
}

fn start_route(
    platform: &Arc<Platform>,
    config: &gateway::Config,
    access: Access,
    plan: ConsumerPlan,
    tasks: &mut Tasks,
) -> Result<(Arc<Route>, Lag), CheckError> {
    let route = Arc::new(Route::new(config, access, platform.stop.clone())?);
    let ConsumerPlan { name, topic, group, .. } = plan;
    let target = route.target();
    tracing::info!(route = config.name, topic, group, target, rate = config.rate, config.workers, "starting route");
    let letters = platform.settings.kafka.topic(dlq::DELIVERIES_TOPIC);
    let subscription = Subscription {
        name,
        topic,
        group,
        max_batch_records: 500,
        max_batch_bytes: 256 << 10,
        dead_letters: DeadLetters::new(platform.producer.clone(), letters),
        lag: Lag::default(),
    };
    let lag = subscription.lag.clone();
    let keyed = Keyed { concurrency: config.workers, span: SPAN };
    let consumers = raise_stall_timeout(platform.consumers(), config);
    let (platform, check, handler) = (platform.clone(), platform.health.check(name), route.clone());
    tasks.spawn(name, async move {
        let wait = await_topics(&platform, &subscription.topic, &check);
        if platform.stop.run_until_cancelled(wait).await.is_none() {
            return Ok(());
        }
        check.pass();
        consumers.keyed(subscription, keyed, handler).await
    });
    Ok((route, lag))
}

/// Raises the stall timeout to at least twice the sum of the request timeout and the interval of
/// the rate limit, so that a slow target or a rate of one record an hour does not count as a stall.
fn raise_stall_timeout(mut consumers: Consumers, config: &gateway::Config) -> Consumers {
    let slot_ms = if config.rate > 0.0 { (1_000.0 / config.rate) as u64 } else { 0 };
    let usual_ms = config.timeout_ms.saturating_add(slot_ms);
    let stall_ms = &mut consumers.config.consumer.stall_timeout_ms;
    *stall_ms = (*stall_ms).max(usual_ms.saturating_mul(2));
    consumers
}

/// Waits until the topic exists, then at most `TOPICS_TIMEOUT` for postrider's own topics.
async fn await_topics(platform: &Platform, topic: &str, check: &Check) {
    let mut logged = false;
    loop {
        match platform.broker.partitions(topic).await {
            Ok(Some(_)) => break,
            Ok(None) => {
                check.fail(format!("topic `{topic}` does not exist yet"));
                if !logged {
                    tracing::warn!(topic, "topic does not exist yet, waiting for it");
                    logged = true;
                }
            }
            Err(error) => check.fail(format!("looking up topic `{topic}` failed: {error}")),
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let began = Instant::now();
    while !platform.topics_ready.get() && began.elapsed() < TOPICS_TIMEOUT {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
