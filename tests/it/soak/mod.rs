//! Runs the whole product under load with a fault every few seconds. A ledger records what clients
//! send and see, and a judge checks it (docs/soak.md). `cargo test` runs one minute, `make soak`
//! the time in `MINUTES`.

mod check;
mod commits;
mod events;
mod faults;
mod feeds;
mod fleet;
mod history;
mod inject;
mod judged;
mod ledger;
mod posters;
mod present;
mod readers;
mod received;
mod recovery;
mod report;
mod senders;
mod settle;
mod tail;
mod tamper;
mod target;
mod visitors;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use fastrand::Rng;
use serde_json::json;
use tokio::{task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;

use self::{
    check::Finding,
    faults::Site,
    fleet::Fleet,
    inject::{Inject, Injection},
    ledger::{Ledger, Topic},
    posters::Poster,
    readers::Follower,
    report::Report,
    senders::{Clients, Sender, Style},
    settle::{Gauge, judge},
    tail::Tail,
    target::Target,
};
use crate::harness::{
    Stack, World,
    proxy::Proxy,
    sessions::Notebook,
    variables::{number, text},
    wait::seconds,
};

/// Interval of the progress lines and of the judge's checks during the run.
const PROGRESS: Duration = Duration::from_secs(5);
const PARTITIONS: i32 = 4;
/// The consumer groups, without prefix, and the topics that they consume.
const GROUPS: [(Topic, &str); 5] = [
    (Topic::Messages, "postrider-kv"),
    (Topic::Orders, "soak"),
    (Topic::Comments, "postrider-comments"),
    (Topic::Chat, "client-response-group"),
    (Topic::Posts, "postrider-feed"),
];

/// Settings from the environment.
struct Plan {
    lasts: Duration,
    seed: u64,
    inject: Option<Inject>,
    brokers: String,
}

impl Plan {
    fn read() -> Self {
        Self {
            lasts: seconds(number("SOAK_SECONDS").unwrap_or(60)),
            seed: number("SOAK_SEED").unwrap_or_else(|| Rng::new().u64(..1 << 32)),
            inject: text("SOAK_INJECT").map(|word| Inject::parse(&word)),
            brokers: text("SOAK_BROKERS").unwrap_or_else(|| "1".to_owned()),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_fails_what_must_hold_holds() {
    let plan = Plan::read();
    eprintln!("soak: {} s, seed {}", plan.lasts.as_secs(), plan.seed);
    let mut run = Run::start(&plan).await;
    run.go(&plan).await;
    let findings = run.settle().await;
    let ledger = run.site.ledger.clone();
    let evidence = ledger.evidence().clone();
    let report = Report { evidence: &evidence, findings: &findings, seed: plan.seed, lasted_ms: ledger.now_ms() };
    eprintln!("{report}");
    if let Some(inject) = plan.inject {
        let found = findings.iter().any(|finding| finding.rule == inject.breaks());
        assert!(found, "the judge did not report {inject:?} as a violation of: {}", inject.breaks());
        panic!("the judge found {inject:?}, as intended");
    }
    let unnoticed = inject::unnoticed(&evidence);
    unnoticed.iter().for_each(|what| eprintln!("soak: the judge does not notice: {what}"));
    assert_eq!(findings, Vec::<Finding>::new(), "seed {}, logs in target/test-logs/{}*", plan.seed, run.prefix);
    assert_eq!(unnoticed, Vec::<&str>::new(), "the judge did not notice these changes");
}

/// Everything that runs. The fields are dropped in this order: clients, then processes, then
/// servers.
struct Run {
    clients: Clients,
    tasks: JoinSet<()>,
    senders: JoinSet<()>,
    tail: Option<Tail>,
    notebook: Notebook,
    gauge: Arc<Gauge>,
    prefix: String,
    site: Arc<Site>,
    world: Arc<World>,
}

impl Run {
    async fn start(plan: &Plan) -> Self {
        let (ledger, began) = (Ledger::new(), std::time::Instant::now());
        let injection = Injection::new(plan.inject);
        let [kafka, redis, postgres] = [Proxy::start().await, Proxy::start().await, Proxy::start().await];
        let stack = stack(plan, &kafka).await;
        eprintln!("soak: servers up after {:?}", began.elapsed());
        let world = Arc::new(world(plan, &stack, &[&kafka, &redis, &postgres]).await);
        let target = Target::start(ledger.clone(), injection.clone()).await;
        let orders = world.make_topic(Topic::Orders.name(), PARTITIONS).await;
        let relays = json!([{
            "name": "soak", "topic": orders, "group": "soak", "target_url": target.url(), "allow": ["127.0.0.0/8"],
            "workers": 32, "rate": 0, "timeout_ms": 3_000, "retries": 4, "retry_delay_ms": 200,
            "backoff": "exponential", "max_retry_delay_ms": 2_000,
        }]);
        let fleet = Arc::new(Fleet::start(&world, &relays.to_string()).await);
        let proxies = [("kafka", kafka), ("redis", redis), ("postgres", postgres)];
        let gauge = Arc::new(Gauge::new(&world));
        let notebook = Notebook::new(ledger.began(), plan.inject.and_then(Inject::trick));
        let site =
            Site { stack, fleet: fleet.clone(), target, proxies, ledger: ledger.clone(), notebook: notebook.clone() };
        let site = Arc::new(site);
        let clients = Clients { fleet, ledger: ledger.clone(), orders, stop: CancellationToken::new(), injection };
        let (prefix, tail) = (world.prefix.clone(), None);
        let (tasks, senders) = (JoinSet::new(), JoinSet::new());
        let mut run = Self { clients, tasks, senders, tail, notebook, gauge, prefix, site, world };
        run.await_ready(seconds(60)).await;
        run.watch(plan.seed).await;
        eprintln!("soak: all up after {:.1} s", began.elapsed().as_secs_f32());
        run
    }

    /// Starts everything that only reads: the topic reader, the readers, the devices and the
    /// samplers.
    async fn watch(&mut self, seed: u64) {
        let ledger = self.site.ledger.clone();
        let partitions = partitions();
        self.tail = Some(Tail::start(&self.world, &partitions, ledger.clone()));
        for number in 0..2 {
            let follower = Follower::start(&self.clients, &format!("follower-{number}"), seed + number).await;
            self.tasks.spawn(follower.run(self.clients.clone()));
            self.tasks.spawn(readers::pull(self.clients.clone(), format!("reader-{number}"), seed + 10 + number));
        }
        for number in 0..2 {
            self.tasks.spawn(posters::read(self.clients.clone(), seed + 20 + number));
        }
        for visitor in visitors::all(&self.clients, seed + 300) {
            self.tasks.spawn(visitor);
        }
        for device in readers::devices(&self.clients, &self.notebook, seed + 200) {
            self.tasks.spawn(device.run());
        }
        let (fleet, watched) = (self.site.fleet.clone(), ledger.clone());
        self.tasks.spawn(async move { fleet.watch(&watched).await });
        let gauge = self.gauge.clone();
        self.tasks.spawn(async move {
            loop {
                gauge.sample(&ledger).await;
                sleep(seconds(1)).await;
            }
        });
    }

    /// Runs load and faults for the planned time, or until the judge finds a violation.
    async fn go(&mut self, plan: &Plan) {
        let styles = [
            Style::View,
            Style::View,
            Style::PushOnce,
            Style::Produce,
            Style::Produce,
            Style::ProduceOnce,
            Style::Batch,
            Style::Stream,
            Style::Comment,
            Style::Comment,
            Style::Message,
            Style::Message,
            Style::MessageOnce,
        ];
        for (number, style) in styles.into_iter().enumerate() {
            let name = format!("{}{number}", format!("{style:?}").to_lowercase());
            let sender = Sender::new(self.clients.clone(), style, &name, plan.seed + 100 + number as u64);
            self.senders.spawn(sender.run());
        }
        for (number, repeats) in [true, true, false].into_iter().enumerate() {
            let name = format!("author{number}");
            let poster = Poster::new(self.clients.clone(), repeats, &name, plan.seed + 400 + number as u64);
            self.senders.spawn(poster.run());
        }
        let end = tokio::time::Instant::now() + plan.lasts;
        let (site, over) = (self.site.clone(), CancellationToken::new());
        let (rng, ended) = (Rng::with_seed(plan.seed), over.clone());
        let troubled = tokio::spawn(async move { site.trouble(rng, &ended).await });
        while tokio::time::Instant::now() < end {
            tokio::time::sleep_until(end.min(tokio::time::Instant::now() + PROGRESS)).await;
            if !self.progress().await {
                break;
            }
        }
        over.cancel();
        troubled.await.unwrap();
    }

    /// Prints a line of progress; returns whether no rule is violated.
    async fn progress(&self) -> bool {
        self.site.ledger.evidence().sessions = self.notebook.sessions();
        let found = judge(&self.site.ledger, check::at_any_time).await;
        let evidence = self.site.ledger.evidence();
        let done = evidence.writes.iter().filter(|write| write.done_ms.is_some()).count();
        let (sent, seen, delivered) = (evidence.writes.len(), evidence.sights.len(), evidence.deliveries.len());
        let rss = evidence.peak_rss_kib.values().max().copied().unwrap_or(0) >> 10;
        let faults = evidence.faults.len();
        drop(evidence);
        let at = self.site.ledger.now_ms() as f64 / 1e3;
        eprintln!(
            "soak: {at:6.1} s  sent {sent}, acknowledged {done}, read {seen}, delivered {delivered}, faults {faults}, {rss} MiB"
        );
        found.iter().for_each(|finding| eprintln!("soak: {finding}"));
        found.is_empty()
    }
}

/// Starts dedicated servers. The broker advertises the proxy's address, so all its clients go
/// through the proxy.
async fn stack(plan: &Plan, kafka: &Proxy) -> Stack {
    let advertised = format!("advertised.listeners=PLAINTEXT://{}", kafka.address);
    let mut options = vec!["--brokers", &plan.brokers];
    // Shorter than the defaults, so that more faults fit into the run.
    let session = "group.consumer.session.timeout.ms=6000";
    for setting in [session, "broker.session.timeout.ms=3000", "broker.heartbeat.interval.ms=500", &advertised] {
        // Three brokers cannot share one address.
        if plan.brokers == "1" || !setting.starts_with("advertised") {
            options.extend(["--kafka-config", setting]);
        }
    }
    Stack::behind("soak", &options, |upstream| kafka.lead_to(upstream)).await
}

/// Creates the run's own namespace on the servers, reached through the proxies.
async fn world(plan: &Plan, stack: &Stack, proxies: &[&Proxy; 3]) -> World {
    let mut world = World::on(stack).await.with_postgres().await;
    let [kafka, redis, postgres] = proxies;
    world.reach_through(redis, postgres);
    let one_broker = !stack.get("KAFKA_BROKERS").contains(',');
    kafka.lead_to(if one_broker { stack.get("KAFKA_BROKERS") } else { "127.0.0.1:1" });
    let brokers = if one_broker { kafka.address.to_string() } else { stack.get("KAFKA_BROKERS").to_owned() };
    for (name, value) in [
        ("KAFKA__BROKERS", brokers),
        ("KAFKA__PRODUCER__DELIVERY_TIMEOUT_MS", "4000".to_owned()),
        ("KV__PARTITIONS", PARTITIONS.to_string()),
        ("COMMENTS__PARTITIONS", PARTITIONS.to_string()),
        ("MESSAGES__PARTITIONS", PARTITIONS.to_string()),
        ("FEED__PARTITIONS", PARTITIONS.to_string()),
        // So low that some authors' posts are fanned out inline, some by jobs, and some not at all.
        ("FEED__CELEBRITY_FOLLOWERS", "4".to_owned()),
        ("FEED__INLINE_FOLLOWERS", "1".to_owned()),
        // So low that jobs have many steps, whose number grows with the posts of an author.
        ("FEED__CHUNK_ROWS", (plan.lasts.as_secs() / 30).max(2).to_string()),
        ("FEED__TIMELINE_IDS", "30".to_owned()),
        ("FEED__KEEP_ROWS", "0".to_owned()),
        // So short that all of these timeouts occur within a minute.
        ("MESSAGES__UNDELIVERED_AFTER_MS", present::UNDELIVERED_AFTER_MS.to_string()),
        ("MESSAGES__PRESENCE__LEASE_MS", present::LEASE_MS.to_string()),
        ("MESSAGES__PRESENCE__HEARTBEAT_MS", present::HEARTBEAT_MS.to_string()),
        ("MESSAGES__PRESENCE__LINGER_MS", present::LINGER_MS.to_string()),
        // A buffer so small that devices fall behind, and pings so frequent that devices notice a frozen process.
        ("MESSAGES__CONNECTION_BUFFER_BYTES", "2000".to_owned()),
        ("MESSAGES__PING_INTERVAL_MS", "500".to_owned()),
        ("MESSAGES__STREAM_MAX_AGE_MS", "5000".to_owned()),
        ("MESSAGES__CLOSE_JITTER_MS", "500".to_owned()),
        ("MESSAGES__SWEEP_INTERVAL_MS", "2000".to_owned()),
    ] {
        world.set(&format!("POSTRIDER_{name}"), &value);
    }
    world
}

fn partitions() -> BTreeMap<Topic, i32> {
    // Every world has two partitions for the topics that `world` does not configure.
    let two = |topic: &Topic| matches!(topic, Topic::Events | Topic::Deliveries | Topic::Presence);
    let count = |topic: &Topic| if two(topic) { 2 } else { PARTITIONS };
    Topic::ALL.iter().map(|topic| (*topic, count(topic))).collect()
}
