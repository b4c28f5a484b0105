//! Runs a process: sets up the platform, starts the role, serves and drains.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use metrics_exporter_prometheus::PrometheusHandle;
use postrider_health::{Check, Health};
use postrider_http::serve;
use postrider_kafka::{Admin, Broker, CallersProducer, Producer, TopicsReady};
use postrider_limits::memory;
use postrider_outbox_backlog::Backlog;
use postrider_postgres as postgres;
use postrider_process::{
    drain::{self, Signals, TaskFailure, Tasks},
    replace::{self, Inherited},
};
use postrider_redis::Redis;
use postrider_rotation::{self as rotation, Fingerprint};
use postrider_telemetry as telemetry;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sqlx::PgPool;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{
    api,
    auth::Auth,
    error::Error,
    management,
    platform::{Mission, Platform, RelayCommand, SharedRedis},
    processor,
    relay::{self, CheckError},
    rotation::{Load, RoleTrial},
    settings::{Settings, TopicPlan},
    topics,
};

/// Time beyond the grace within which tasks have to end.
const TASKS_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum duration of the shutdown beyond the readiness delay and the grace of tasks and
/// producers: it covers `TASKS_TIMEOUT`, the management port, traces and the runtime.
const CLOSING: Duration = Duration::from_secs(11);

/// Everything that a process needs to start.
struct StartUp {
    settings: Settings,
    /// The settings with their sources, as JSON for operators.
    shown_settings: Arc<str>,
    mission: Mission,
    load: Load,
    /// Fingerprint of the watched files when `settings` were loaded; `None` if no files are
    /// watched.
    files: Option<Fingerprint>,
    signals: Signals,
}

/// What follows after a clean shutdown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// There is nothing more to do.
    Finished,
    /// The signal with this name stopped the process.
    Stopped(&'static str),
    /// Replace this process with a new one.
    Replace,
}

/// Runs the configured role until a signal or a failure.
pub fn run(load: Load) -> Result<(), Error> {
    launch(load, Mission::Role).map(drop)
}

/// Runs the command `relay` until a signal, a failure, or the end of the records that it is to
/// deliver. Returns the name of the signal that stopped it.
pub fn run_relay(command: RelayCommand, load: Load) -> Result<Option<&'static str>, Error> {
    command.route.check().map_err(CheckError::from)?;
    launch(load, Mission::Relay(Box::new(command)))
}

fn launch(load: Load, mission: Mission) -> Result<Option<&'static str>, Error> {
    let inherited = Inherited::now();
    let signals = Signals::listen().map_err(Error::Signals)?;
    let mut loaded = load()?;
    let files = match loaded.settings.rotation.files.is_empty() {
        true => None,
        false => {
            let files = Fingerprint::read(&loaded.settings.rotation.files).ok();
            // Loads again after taking the fingerprint, so that a later change of a file is always
            // detected.
            loaded = load()?;
            files
        }
    };
    let shown_settings: Arc<str> = serde_json::to_string(&postrider_config::shown(&loaded))?.into();
    let settings = loaded.settings;
    let workers = match settings.worker_threads {
        0 => std::thread::available_parallelism().map_or(2, usize::from),
        count => count,
    };
    // At least two: trace exporters wait for tasks that need a second thread.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers.max(2))
        .thread_name("postrider")
        .enable_all()
        .build()
        .map_err(Error::Runtime)?;
    let start_up = StartUp { settings, shown_settings, mission, load, files, signals: signals.clone() };
    let outcome = runtime.block_on(run_process(start_up));
    runtime.shutdown_timeout(Duration::from_secs(2));
    match outcome? {
        // A signal that arrives meanwhile ends the process instead of replacing it.
        End::Replace => {
            replace::replace(&inherited, &signals)?;
            Ok(None)
        }
        End::Stopped(signal) => Ok(Some(signal)),
        End::Finished => Ok(None),
    }
}

async fn run_process(start_up: StartUp) -> Result<End, Error> {
    let settings = &start_up.settings;
    let metrics = telemetry::install_metrics()?;
    let traces = telemetry::init(&settings.telemetry, &settings.role.to_string())?;
    let (files, memory_bytes) = (raise_file_limit(), memory::divide(&settings.memory, settings.role.serves_api()));
    tracing::info!(role = %settings.role, version = env!("CARGO_PKG_VERSION"), files, memory_bytes, "starting");
    telemetry::note_start();
    rotation::describe();
    let outcome = serve_until_stopped(start_up, metrics).await;
    let flushed = tokio::task::spawn_blocking(move || traces.shutdown(Duration::from_secs(3)));
    if flushed.await.is_err() {
        tracing::warn!("trace exporter failed at shutdown");
    }
    match outcome {
        Ok(End::Replace) => tracing::info!("stopped, replacing the process"),
        _ => tracing::info!("stopped"),
    }
    outcome
}

async fn serve_until_stopped(start_up: StartUp, metrics: PrometheusHandle) -> Result<End, Error> {
    let StartUp { settings, shown_settings, mission, load, files, signals } = start_up;
    let health = Health::default();
    // The management port answers probes before every check exists; this check keeps readiness
    // false.
    let start = health.check("start");
    // Binds every address before anything else starts, so that a port in use is the only error.
    let refused = |setting| move |source| Error::Bind { setting, source };
    let management =
        management::bind(&settings.management.listen, &mission).await.map_err(refused("management.listen"))?;
    let http = match &mission {
        Mission::Role if settings.role.serves_api() => {
            serve::bind(&settings.http.listen).await.map_err(refused("http.listen"))?
        }
        _ => Vec::new(),
    };
    for listener in &management {
        let address = listener.local_addr().map_err(Error::Listener)?;
        tracing::info!(%address, "serving probes and metrics");
    }
    let broker = Broker::start(&settings.kafka, health.check("kafka"))?;
    let admin = Admin::new(&settings.kafka, broker.clone())?;
    let producer = Producer::start(&settings.kafka, broker.clone())?;
    let callers_producer = match &mission {
        Mission::Role if settings.role.serves_api() => Some(CallersProducer::start(&settings.kafka, &broker)?),
        _ => None,
    };
    let postgres = match &mission {
        Mission::Role => open_postgres(&settings)?,
        Mission::Relay(_) => None,
    };
    let backlog = Backlog::new(&settings.outbox);
    let platform = Arc::new(Platform {
        backlog,
        settings: Arc::new(settings),
        shown_settings,
        health: health.clone(),
        metrics: metrics.clone(),
        broker,
        producer,
        callers_producer,
        admin: Arc::new(admin),
        topics_ready: TopicsReady::default(),
        postgres,
        stop: CancellationToken::new(),
        finished: CancellationToken::new(),
    });
    let mut tasks = Tasks::new(platform.stop.clone());
    let redis = lazy_redis(&platform, &mut tasks);
    let auth = match &platform.callers_producer {
        Some(_) => Some(Auth::start(&platform, redis.clone(), &mut tasks)?),
        None => None,
    };
    let management = management::serve(&platform, management, auth.as_ref(), &mut tasks)?;
    watch_platform(&platform, &mut tasks);
    let trial = RoleTrial { platform: &platform, mission: &mission, load: &load };
    let rotation = rotation::Watch::new(platform.settings.rotation.clone(), files, trial, &health);
    let shared = Shared { redis, auth, http };
    let outcome = run_mission(&platform, &mission, shared, &start, signals, rotation, tasks).await;
    let (producer, callers_producer) = (platform.producer.clone(), platform.callers_producer.clone());
    let grace = platform.settings.drain.grace();
    let close = move || {
        let until = Instant::now() + grace;
        callers_producer.inspect(|producer| producer.close(grace));
        producer.close(until.saturating_duration_since(Instant::now()));
    };
    if tokio::task::spawn_blocking(close).await.is_err() {
        tracing::error!("closing the producer failed");
    }
    management.stop.cancel();
    if management.server.await.is_err() {
        tracing::error!("management port failed");
    }
    outcome
}

/// Reports the death of the platform's clients like that of a task. The clients themselves outlive
/// the tasks, which use them until they end.
fn watch_platform(platform: &Platform, tasks: &mut Tasks) {
    tasks.watch("metadata client", platform.broker.died());
    tasks.watch("producer", platform.producer.died());
    for (name, died) in platform.callers_producer.iter().flat_map(CallersProducer::died) {
        tasks.watch(name, died);
    }
}

/// Parts that are made before the role starts.
struct Shared {
    redis: SharedRedis,
    /// `None` if the role serves no API.
    auth: Option<Auth>,
    /// The bound addresses of the API.
    http: Vec<TcpListener>,
}

fn start_role(platform: &Arc<Platform>, shared: Shared, tasks: &mut Tasks) -> Result<(), Error> {
    let Shared { redis, auth, http } = shared;
    let settings = &platform.settings;
    if let Some(pool) = platform.postgres.clone() {
        tasks.spawn_forever("postgres watch", postgres::watch(pool.clone(), platform.health.check("postgres")));
        if settings.role.serves_api() || settings.role.relays() {
            tasks.spawn_forever("outbox backlog", platform.backlog.clone().watch(pool));
        }
    }
    topics::keep(platform, TopicPlan::specs(settings), tasks);
    if let (Some(callers_producer), Some(auth)) = (platform.callers_producer.clone(), auth) {
        api::start(platform, callers_producer, http, redis.clone(), &auth, tasks)?;
    }
    if settings.role.processes() {
        processor::start(platform, redis.clone(), tasks);
    }
    if settings.role.relays() {
        relay::start(platform, tasks)?;
    }
    Ok(())
}

fn start_mission(platform: &Arc<Platform>, mission: &Mission, shared: Shared, tasks: &mut Tasks) -> Result<(), Error> {
    tasks.spawn_forever("metrics upkeep", telemetry::upkeep(platform.metrics.clone()));
    match mission {
        Mission::Role => start_role(platform, shared, tasks)?,
        Mission::Relay(command) => {
            topics::keep(platform, TopicPlan::deliveries(&platform.settings), tasks);
            relay::start_command(platform, command, tasks)?;
        }
    }
    announce_ready(platform, tasks);
    Ok(())
}

/// Runs until a signal, a rotation or a failure, then drains: readiness goes false at once, tasks
/// are stopped after the readiness delay, and tasks that exceed their time are aborted.
async fn run_mission(
    platform: &Arc<Platform>,
    mission: &Mission,
    shared: Shared,
    start: &Check,
    mut signals: Signals,
    rotation: rotation::Watch<RoleTrial<'_>>,
    mut tasks: Tasks,
) -> Result<End, Error> {
    let settings = &platform.settings;
    let (ended, delay) = match start_mission(platform, mission, shared, &mut tasks) {
        Ok(()) => {
            start.pass();
            let ended = serve_on(platform, &mut signals, rotation, &mut tasks).await;
            // Before a replacement, `serve_on` has already waited for the readiness delay. A
            // process without more to do has no traffic.
            let waited = matches!(ended, Ok(End::Replace)) || platform.finished.is_cancelled();
            let delay = if waited { Duration::ZERO } else { settings.drain.readiness_delay() };
            (ended.map_err(Error::Tasks), delay)
        }
        // The process was never ready, so it received no traffic.
        Err(error) => (Err(error), Duration::ZERO),
    };
    platform.health.drain();
    drain::exit_after(delay + 2 * settings.drain.grace() + CLOSING);
    if let Err(error) = &ended {
        tracing::warn!(problem = %error, "draining after a failure");
    }
    let late = tokio::select! {
        late = tasks.failure() => Err(late),
        () = tokio::time::sleep(delay) => Ok(()),
    };
    let finished = tasks.finish(settings.drain.grace() + TASKS_TIMEOUT).await;
    let end = ended?;
    late.and(finished)?;
    Ok(end)
}

/// Serves until a signal, a rotation or a failure. Before a rotation, readiness goes false and the
/// readiness delay passes in this function, because the drain can still be called off.
async fn serve_on(
    platform: &Platform,
    signals: &mut Signals,
    mut rotation: rotation::Watch<RoleTrial<'_>>,
    tasks: &mut Tasks,
) -> Result<End, TaskFailure> {
    loop {
        let name = tokio::select! {
            failure = tasks.failure() => return Err(failure),
            name = signals.first() => Some(name),
            () = platform.finished.cancelled() => return Ok(End::Finished),
            () = rotation.until_due() => {
                tracing::info!("draining to restart with rotated files");
                platform.health.drain();
                tokio::select! {
                    failure = tasks.failure() => return Err(failure),
                    name = signals.first() => Some(name),
                    () = tokio::time::sleep(platform.settings.drain.readiness_delay()) => None,
                }
            }
        };
        if let Some(name) = name {
            tracing::info!(signal = name, "draining");
            rotation.call_off().await;
            return Ok(End::Stopped(name));
        }
        if rotation.is_still_due().await {
            return Ok(End::Replace);
        }
        tracing::warn!("mounted files changed again, drain called off");
        platform.health.call_off_drain();
    }
}

fn lazy_redis(platform: &Platform, tasks: &mut Tasks) -> SharedRedis {
    let (sender, receiver) = tokio::sync::watch::channel(None);
    let config = platform.settings.redis.clone();
    if !platform.settings.role.serves_api() && !platform.settings.role.processes() {
        return receiver;
    }
    let check = platform.health.check("redis");
    let (memory, fails) = (platform.health.check("redis memory"), !platform.settings.role.serves_api());
    // The check `redis` reports problems until there is a connection.
    memory.pass();
    tasks.spawn_forever("redis connection", async move {
        let redis = Redis::connect_patiently(&config, &check).await;
        check.pass();
        sender.send_replace(Some(redis.clone()));
        tokio::join!(redis.clone().watch(config, check), redis.watch_memory(memory, fails));
    });
    receiver
}

/// Opens the connection pool that all capabilities share.
fn open_postgres(settings: &Settings) -> Result<Option<PgPool>, postgres::Error> {
    if settings.postgres.url.is_empty() {
        tracing::warn!("`postgres.url` is not set, features that need Postgres are disabled");
        return Ok(None);
    }
    postgres::pool(&settings.postgres).map(Some)
}

fn announce_ready(platform: &Arc<Platform>, tasks: &mut Tasks) {
    let (health, stop, started) = (platform.health.clone(), platform.stop.clone(), Instant::now());
    tasks.spawn_infallible("ready announcement", async move {
        while !health.readiness().0 && !stop.is_cancelled() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if !stop.is_cancelled() {
            tracing::info!(after.ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(0), "ready");
        }
        stop.cancelled().await;
    });
}

/// Raises the soft limit on open files to the hard limit and returns it.
fn raise_file_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if setrlimit(Resource::Nofile, raised).is_ok() { limit.maximum.unwrap_or(0) } else { limit.current.unwrap_or(0) }
}
