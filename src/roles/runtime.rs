//! The life of a process: set up the platform, build the role, serve, drain.

use std::{sync::Arc, time::Duration};

use metrics_exporter_prometheus::PrometheusHandle;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio_util::sync::CancellationToken;

use super::{
    api, processor, relay,
    settings::{Settings, TopicPlan},
};
use crate::platform::{
    drain::{self, Tasks},
    http::serve,
    kafka::{Admin, Broker, Producer, TopicSpec, TopicsReady},
    ops::{self, Check, Health},
    postgres,
    redis::Redis,
    telemetry,
};

/// What every role stands on.
pub(super) struct Platform {
    pub settings: Arc<Settings>,
    pub health: Health,
    pub metrics: PrometheusHandle,
    pub broker: Broker,
    pub producer: Producer,
    pub admin: Arc<Admin>,
    pub topics_ready: TopicsReady,
    /// Ends intake and loops.
    pub stop: CancellationToken,
}

/// Runs the configured role until a signal or a failure. The error is a sentence for the operator.
pub fn run(settings: Settings) -> Result<(), String> {
    let workers = match settings.worker_threads {
        0 => std::thread::available_parallelism().map_or(2, usize::from),
        count => count,
    };
    // Two at least: exporters of traces wait on tasks that need a second one.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers.max(2))
        .thread_name("postrider")
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start the runtime: {error}"))?;
    let outcome = runtime.block_on(live(settings));
    runtime.shutdown_timeout(Duration::from_secs(2));
    outcome
}

async fn live(settings: Settings) -> Result<(), String> {
    let metrics = telemetry::install_metrics()?;
    let traces = telemetry::init(&settings.telemetry, &settings.role.to_string())?;
    let files = raise_file_limit();
    tracing::info!(role = %settings.role, version = env!("CARGO_PKG_VERSION"), files, "starting");
    let outcome = serve_until_stopped(settings, metrics).await;
    let flushed = tokio::task::spawn_blocking(move || traces.shutdown(Duration::from_secs(3)));
    if flushed.await.is_err() {
        tracing::warn!("the trace exporter failed at shutdown");
    }
    tracing::info!("stopped");
    outcome
}

async fn serve_until_stopped(settings: Settings, metrics: PrometheusHandle) -> Result<(), String> {
    let signal = tokio::spawn(drain::signalled());
    let health = Health::default();
    let management = serve::bind(&settings.management.listen).await.map_err(|error| error.to_string())?;
    for listener in &management {
        let address = listener.local_addr().map_err(|error| error.to_string())?;
        tracing::info!(%address, "serving probes and metrics");
    }
    let broker = Broker::start(&settings.kafka, health.check("kafka")).map_err(|error| format!("kafka: {error}"))?;
    let admin = Admin::new(&settings.kafka, broker.clone()).map_err(|error| format!("kafka: {error}"))?;
    let producer = Producer::start(&settings.kafka, broker.clone()).map_err(|error| format!("kafka: {error}"))?;
    let platform = Arc::new(Platform {
        settings: Arc::new(settings),
        health: health.clone(),
        metrics: metrics.clone(),
        broker,
        producer,
        admin: Arc::new(admin),
        topics_ready: TopicsReady::default(),
        stop: CancellationToken::new(),
    });
    // The management port answers until the very end, so it has a stop of its own.
    let management_stop = CancellationToken::new();
    let config = platform.settings.http.clone();
    let router = ops::router(health.clone(), metrics.clone());
    let management = tokio::spawn({
        let stop = management_stop.clone();
        async move { serve::serve(management, router, &config, stop, Duration::from_secs(1)).await }
    });
    let outcome = run_role(&platform, signal).await;
    let producer = platform.producer.clone();
    let grace = platform.settings.drain.grace();
    if tokio::task::spawn_blocking(move || producer.close(grace)).await.is_err() {
        tracing::error!("the producer failed while it was closed");
    }
    management_stop.cancel();
    if management.await.is_err() {
        tracing::error!("the management port failed");
    }
    outcome
}

type Signal = tokio::task::JoinHandle<std::io::Result<&'static str>>;

async fn run_role(platform: &Arc<Platform>, mut signal: Signal) -> Result<(), String> {
    let settings = &platform.settings;
    let mut tasks = Tasks::new(platform.stop.clone());
    tasks.spawn_forever("metrics upkeep", telemetry::upkeep(platform.metrics.clone()));
    watch_postgres(platform, &mut tasks)?;
    ensure_topics(platform, &mut tasks);
    let redis = lazy_redis(platform);
    if settings.role.serves_api() {
        api::start(platform, redis.clone(), &mut tasks).await?;
    }
    if settings.role.processes() {
        processor::start(platform, redis.clone(), &mut tasks)?;
    }
    if settings.role.relays() {
        relay::start(platform, &mut tasks);
    }
    announce_ready(platform, &mut tasks);
    let mut running = tokio::spawn(tasks.join());
    let early = tokio::select! {
        ended = &mut running => Some(ended),
        received = &mut signal => {
            let name = received.ok().and_then(Result::ok).unwrap_or("no signal handler");
            tracing::info!(signal = name, "draining");
            None
        }
    };
    platform.health.drain();
    if let Some(ended) = early {
        return ended.unwrap_or_else(|error| Err(error.to_string())).and(Err("the role ended by itself".to_owned()));
    }
    tokio::time::sleep(settings.drain.readiness_delay()).await;
    platform.stop.cancel();
    let patience = settings.drain.grace() + Duration::from_secs(5);
    match tokio::time::timeout(patience, running).await {
        Ok(ended) => ended.unwrap_or_else(|error| Err(error.to_string())),
        Err(_) => Err(format!("tasks did not end within {} s", patience.as_secs())),
    }
}

/// A connection that is made in the background, once, and shared by the rooms.
pub(super) type SharedRedis = tokio::sync::watch::Receiver<Option<Redis>>;

fn lazy_redis(platform: &Platform) -> SharedRedis {
    let (sender, receiver) = tokio::sync::watch::channel(None);
    let config = platform.settings.redis.clone();
    if !platform.settings.role.serves_api() && !platform.settings.role.processes() {
        return receiver;
    }
    let check = platform.health.check("redis");
    let stop = platform.stop.clone();
    tokio::spawn(stop.run_until_cancelled_owned(async move {
        let redis = Redis::connect_patiently(&config, &check).await;
        check.pass();
        sender.send_replace(Some(redis.clone()));
        redis.watch(check).await;
    }));
    receiver
}

fn watch_postgres(platform: &Platform, tasks: &mut Tasks) -> Result<(), String> {
    if platform.settings.postgres.url.is_empty() {
        tracing::warn!("`postgres.url` is not set: rooms that need Postgres are off");
        return Ok(());
    }
    let pool = postgres::pool(&platform.settings.postgres).map_err(|error| error.to_string())?;
    tasks.spawn_forever("postgres watch", postgres::watch(pool, platform.health.check("postgres")));
    Ok(())
}

fn ensure_topics(platform: &Platform, tasks: &mut Tasks) {
    let admin = platform.admin.clone();
    let check = platform.health.check("topics");
    let specs = TopicPlan::specs(&platform.settings);
    let ready = platform.topics_ready.clone();
    tasks.spawn_forever("topics", async move { keep_topics(&admin, &specs, &check, &ready).await });
}

/// A topic that is not as it must be keeps the process unready, with what to do in the report; it
/// does not end it, because whoever mends the topic should not have to restart us as well.
/// Looked at again all the time, because partitions can be added while we run.
async fn keep_topics(admin: &Admin, specs: &[TopicSpec], check: &Check, ready: &TopicsReady) {
    let mut said = String::new();
    loop {
        let pause_ms = match admin.ensure(specs).await {
            Ok(()) => {
                said.clear();
                ready.set(true);
                check.pass();
                30_000
            }
            // Kafka's own check says so; what was found before still holds.
            Err(error) if error.is_transient() && ready.get() => 3_000,
            Err(error) => {
                let problem = error.to_string();
                ready.set(false);
                if !error.is_transient() && problem != said {
                    tracing::error!(problem, "a topic is not as it must be");
                    said.clone_from(&problem);
                }
                check.fail(problem);
                if error.is_transient() { 250 } else { 5_000 }
            }
        };
        tokio::time::sleep(Duration::from_millis(pause_ms)).await;
    }
}

fn announce_ready(platform: &Arc<Platform>, tasks: &mut Tasks) {
    let (health, stop, started) = (platform.health.clone(), platform.stop.clone(), std::time::Instant::now());
    tasks.spawn("announcement", async move {
        while !health.readiness().0 && !stop.is_cancelled() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if !stop.is_cancelled() {
            tracing::info!(after.ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(0), "ready");
        }
        stop.cancelled().await;
        Ok(())
    });
}

/// Raises the soft limit on open files to the hard one, and returns it.
fn raise_file_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if setrlimit(Resource::Nofile, raised).is_ok() { limit.maximum.unwrap_or(0) } else { limit.current.unwrap_or(0) }
}
