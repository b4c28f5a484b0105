//! The life of a process: set up the platform, build the role, serve, drain.

use std::{
    io::ErrorKind,
    sync::Arc,
    time::{Duration, Instant},
};

use metrics_exporter_prometheus::PrometheusHandle;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sqlx::PgPool;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{
    api, processor,
    relay::{self, RelayCommand},
    settings::{Settings, TopicPlan},
};
use crate::platform::{
    drain::{self, Draining, Ending, Tasks},
    http::{client::Proxies, serve, shortcut::ShortCuts},
    kafka::{
        Admin, Broker, CallersProducer, Producer, TopicError, TopicSpec, TopicsReady, lanes::Lanes, replication::Watch,
    },
    memory,
    ops::{self, Check, Health},
    outbox::Backlog,
    postgres,
    redis::Redis,
    rotation, telemetry,
};

/// Ports after a taken management port that a command tries.
const PORTS_TRIED: u16 = 100;

/// Time beyond the grace that tasks have to end.
const TASKS_PATIENCE: Duration = Duration::from_secs(5);

/// Time that stopping takes at most beyond the readiness delay and the grace of tasks and producers: the patience with
/// tasks, the management port, traces, and the runtime.
const CLOSING: Duration = Duration::from_secs(11);

/// What every role stands on.
pub(super) struct Platform {
    pub settings: Arc<Settings>,
    pub health: Health,
    pub metrics: PrometheusHandle,
    pub broker: Broker,
    pub producer: Producer,
    /// Where the role takes callers' records.
    pub callers_producer: Option<CallersProducer>,
    pub admin: Arc<Admin>,
    pub topics_ready: TopicsReady,
    /// `None` where `postgres.url` is not set: what needs it is off.
    pub postgres: Option<PgPool>,
    /// What waits in Postgres for Kafka.
    pub backlog: Arc<Backlog>,
    /// Ends intake and loops.
    pub stop: CancellationToken,
}

impl Platform {
    /// What runs consumers.
    pub fn lanes(&self) -> Lanes {
        let (config, broker) = (self.settings.kafka.clone(), self.broker.clone());
        Lanes { config, broker, health: self.health.clone(), stop: self.stop.clone() }
    }

    /// How what it serves ends.
    pub fn ending(&self) -> Ending {
        let (died, stop, grace) = (CancellationToken::new(), self.stop.clone(), self.settings.drain.grace());
        Ending { draining: self.health.draining(), died, stop, grace }
    }
}

/// What a process was started for.
enum Mission {
    /// Whatever the configured role says.
    Role,
    /// One route from a topic to a URL, with Kafka alone.
    Relay(Box<RelayCommand>),
}

/// Runs the configured role until a signal or a failure. The error is a sentence for the operator.
pub fn run(settings: Settings) -> Result<(), String> {
    launch(settings, Mission::Role)
}

/// Runs the command `relay`, likewise.
pub fn run_relay(settings: Settings, command: RelayCommand) -> Result<(), String> {
    command.route.check().map_err(|problem| problem.to_string())?;
    launch(settings, Mission::Relay(Box::new(command)))
}

fn launch(settings: Settings, mission: Mission) -> Result<(), String> {
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
    let outcome = runtime.block_on(live(settings, mission));
    runtime.shutdown_timeout(Duration::from_secs(2));
    outcome
}

async fn live(settings: Settings, mission: Mission) -> Result<(), String> {
    let metrics = telemetry::install_metrics()?;
    let traces = telemetry::init(&settings.telemetry, &settings.role.to_string())?;
    let (files, memory_bytes) = (raise_file_limit(), memory::divide(&settings.memory, settings.role.serves_api()));
    tracing::info!(role = %settings.role, version = env!("CARGO_PKG_VERSION"), files, memory_bytes, "starting");
    let outcome = serve_until_stopped(settings, mission, metrics).await;
    let flushed = tokio::task::spawn_blocking(move || traces.shutdown(Duration::from_secs(3)));
    if flushed.await.is_err() {
        tracing::warn!("the trace exporter failed at shutdown");
    }
    tracing::info!("stopped");
    outcome
}

async fn serve_until_stopped(settings: Settings, mission: Mission, metrics: PrometheusHandle) -> Result<(), String> {
    let signal = tokio::spawn(drain::signalled());
    let health = Health::default();
    let management = bind_management(&settings.management.listen, &mission).await?;
    for listener in &management {
        let address = listener.local_addr().map_err(|error| error.to_string())?;
        tracing::info!(%address, "serving probes and metrics");
    }
    let broker = Broker::start(&settings.kafka, health.check("kafka")).map_err(|error| format!("kafka: {error}"))?;
    let admin = Admin::new(&settings.kafka, broker.clone()).map_err(|error| format!("kafka: {error}"))?;
    let producer = Producer::start(&settings.kafka, broker.clone()).map_err(|error| format!("kafka: {error}"))?;
    let callers_producer = match &mission {
        Mission::Role if settings.role.serves_api() => Some(CallersProducer::start(&settings.kafka, &broker)),
        _ => None,
    };
    let callers_producer = callers_producer.transpose().map_err(|error| format!("kafka: {error}"))?;
    let postgres = match &mission {
        Mission::Role => open_postgres(&settings)?,
        Mission::Relay(_) => None,
    };
    let backlog = Backlog::new(&settings.outbox);
    let platform = Arc::new(Platform {
        backlog,
        settings: Arc::new(settings),
        health: health.clone(),
        metrics: metrics.clone(),
        broker,
        producer,
        callers_producer,
        admin: Arc::new(admin),
        topics_ready: TopicsReady::default(),
        postgres,
        stop: CancellationToken::new(),
    });
    let mut tasks = Tasks::new(platform.stop.clone());
    let management = serve_management(&platform, management, &mut tasks);
    watch_platform(&platform, &mut tasks);
    let outcome = run_mission(&platform, &mission, signal, tasks).await;
    let (producer, callers_producer) = (platform.producer.clone(), platform.callers_producer.clone());
    let grace = platform.settings.drain.grace();
    let close = move || {
        let until = Instant::now() + grace;
        callers_producer.inspect(|producer| producer.close(grace));
        producer.close(until.saturating_duration_since(Instant::now()));
    };
    if tokio::task::spawn_blocking(close).await.is_err() {
        tracing::error!("the producer failed while it was closed");
    }
    management.stop.cancel();
    if management.server.await.is_err() {
        tracing::error!("the management port failed");
    }
    outcome
}

/// The management port answers until the very end, so it has a stop of its own.
struct Management {
    stop: CancellationToken,
    server: tokio::task::JoinHandle<()>,
}

fn serve_management(platform: &Platform, listeners: Vec<TcpListener>, tasks: &mut Tasks) -> Management {
    let config = platform.settings.http.clone();
    let router = ops::router(platform.health.clone(), platform.metrics.clone());
    let (stop, died) = (CancellationToken::new(), CancellationToken::new());
    tasks.watch("management port", died.clone());
    let guard = died.clone().drop_guard();
    let ending = Ending { draining: Draining::default(), died, stop: stop.clone(), grace: Duration::from_secs(1) };
    let server = tokio::spawn(async move {
        let _guard = guard;
        serve::serve(
            serve::Audience::Operators,
            listeners,
            router,
            ShortCuts::default(),
            &config,
            Proxies::default(),
            ending,
        )
        .await;
    });
    Management { stop, server }
}

/// Has the death of what runs beside the role count as that of one of its tasks. It outlives them, because they use it
/// until they end.
fn watch_platform(platform: &Platform, tasks: &mut Tasks) {
    tasks.watch("metadata client", platform.broker.died());
    tasks.watch("producer", platform.producer.died());
    for (name, died) in platform.callers_producer.iter().flat_map(CallersProducer::died) {
        tasks.watch(name, died);
    }
}

type Signal = tokio::task::JoinHandle<std::io::Result<&'static str>>;

/// A command takes the next free port where nobody has asked for a certain one, so that several can
/// run side by side.
async fn bind_management(addresses: &[String], mission: &Mission) -> Result<Vec<TcpListener>, String> {
    let error = match serve::bind(addresses).await {
        Ok(listeners) => return Ok(listeners),
        Err(error) => error,
    };
    let any_port = matches!(mission, Mission::Relay(command) if command.any_management_port);
    if let (true, ErrorKind::AddrInUse, [address]) = (any_port, error.kind(), addresses)
        && let Some((host, port)) = address.rsplit_once(':')
        && let Ok(port) = port.parse::<u16>()
    {
        for next in port.saturating_add(1)..=port.saturating_add(PORTS_TRIED) {
            if let Ok(listeners) = serve::bind(&[format!("{host}:{next}")]).await {
                tracing::warn!(taken = port, port = next, "the management port is taken; using the next free one");
                return Ok(listeners);
            }
        }
    }
    Err(error.to_string())
}

async fn start_role(platform: &Arc<Platform>, tasks: &mut Tasks) -> Result<(), String> {
    let settings = &platform.settings;
    if let Some(pool) = platform.postgres.clone() {
        tasks.spawn_forever("postgres watch", postgres::watch(pool.clone(), platform.health.check("postgres")));
        if settings.role.serves_api() || settings.role.relays() {
            tasks.spawn_forever("outbox backlog", platform.backlog.clone().watch(pool));
        }
    }
    ensure_topics(platform, TopicPlan::specs(settings), tasks);
    let redis = lazy_redis(platform, tasks);
    if settings.role.serves_api() {
        api::start(platform, redis.clone(), tasks).await?;
    }
    if settings.role.processes() {
        processor::start(platform, redis.clone(), tasks)?;
    }
    if settings.role.relays() {
        relay::start(platform, tasks)?;
    }
    Ok(())
}

async fn start_mission(platform: &Arc<Platform>, mission: &Mission, tasks: &mut Tasks) -> Result<(), String> {
    tasks.spawn_forever("metrics upkeep", telemetry::upkeep(platform.metrics.clone()));
    match mission {
        Mission::Role => start_role(platform, tasks).await?,
        Mission::Relay(command) => {
            ensure_topics(platform, TopicPlan::deliveries(&platform.settings), tasks);
            relay::start_command(platform, command, tasks)?;
        }
    }
    announce_ready(platform, tasks);
    Ok(())
}

/// Runs until a signal, a rotation, or a failure, and drains. Whichever it is: readiness goes false at once, tasks are
/// stopped after the readiness delay, and those that have not ended when their time is over are aborted.
async fn run_mission(
    platform: &Arc<Platform>,
    mission: &Mission,
    mut signal: Signal,
    mut tasks: Tasks,
) -> Result<(), String> {
    let settings = &platform.settings;
    let started = start_mission(platform, mission, &mut tasks).await;
    // Nobody was sent to what never began.
    let delay = if started.is_ok() { settings.drain.readiness_delay() } else { Duration::ZERO };
    let failure = match started {
        Err(problem) => Some(problem),
        Ok(()) => tokio::select! {
            failure = tasks.failure() => Some(failure),
            received = &mut signal => signal_failure(received),
            () = rotation::changed(&settings.rotation) => None,
        },
    };
    platform.health.drain();
    drain::exit_after(delay + 2 * settings.drain.grace() + CLOSING);
    if let Some(problem) = &failure {
        tracing::warn!(problem, "draining after a failure");
    }
    let late = tokio::select! {
        late = tasks.failure() => Some(late),
        () = tokio::time::sleep(delay) => None,
    };
    let finished = tasks.finish(settings.drain.grace() + TASKS_PATIENCE).await;
    failure.or(late).map_or(finished, Err)
}

/// Returns why a signal cannot be waited for, where that is what has happened.
fn signal_failure(received: Result<std::io::Result<&'static str>, tokio::task::JoinError>) -> Option<String> {
    match received {
        Ok(Ok(name)) => {
            tracing::info!(signal = name, "draining");
            None
        }
        Ok(Err(error)) => Some(format!("cannot wait for signals: {error}")),
        Err(error) => Some(format!("cannot wait for signals: {error}")),
    }
}

/// A connection that is made in the background, once, and shared by the rooms.
pub(super) type SharedRedis = tokio::sync::watch::Receiver<Option<Redis>>;

fn lazy_redis(platform: &Platform, tasks: &mut Tasks) -> SharedRedis {
    let (sender, receiver) = tokio::sync::watch::channel(None);
    let config = platform.settings.redis.clone();
    if !platform.settings.role.serves_api() && !platform.settings.role.processes() {
        return receiver;
    }
    let check = platform.health.check("redis");
    let (memory, fails) = (platform.health.check("redis memory"), !platform.settings.role.serves_api());
    // Until there is a connection, the check above says what is wrong.
    memory.pass();
    tasks.spawn_forever("redis connection", async move {
        let redis = Redis::connect_patiently(&config, &check).await;
        check.pass();
        sender.send_replace(Some(redis.clone()));
        tokio::join!(redis.clone().watch(config, check), redis.watch_memory(memory, fails));
    });
    receiver
}

/// The pool that all rooms share.
fn open_postgres(settings: &Settings) -> Result<Option<PgPool>, String> {
    if settings.postgres.url.is_empty() {
        tracing::warn!("`postgres.url` is not set: rooms that need Postgres are off");
        return Ok(None);
    }
    postgres::pool(&settings.postgres).map(Some).map_err(|error| error.to_string())
}

fn ensure_topics(platform: &Platform, specs: Vec<TopicSpec>, tasks: &mut Tasks) {
    let admin = platform.admin.clone();
    let check = platform.health.check("topics");
    let watch = Watch::new(&platform.settings.kafka, platform.health.check("topic replication"));
    let ready = platform.topics_ready.clone();
    tasks.spawn_forever("topics", async move { keep_topics(&admin, &specs, &check, watch, &ready).await });
}

/// A topic that is not as it must be keeps the process unready, with what to do in the report; it
/// does not end it, because whoever mends the topic should not have to restart us as well.
/// Looked at again all the time, because partitions can be added while we run.
async fn keep_topics(admin: &Admin, specs: &[TopicSpec], check: &Check, mut watch: Watch, ready: &TopicsReady) {
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

fn announce_ready(platform: &Arc<Platform>, tasks: &mut Tasks) {
    let (health, stop, started) = (platform.health.clone(), platform.stop.clone(), Instant::now());
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
