//! Replay and live delivery under random faults: each device gets its receiver's messages once and
//! in order, or a gap where the history ends. `REPLAY_SEED` sets the seed, `REPLAY_STEPS` the
//! number of faults.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use fastrand::Rng;
use reqwest::Client;
use serde_json::Value;
use sqlx::ConnectOptions;
use tokio::{
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use crate::{
    harness::{
        App, Stack, World,
        device::{Device, Surroundings},
        inbox::message,
        mailbox::{Breach, Noted, Sent, Truth, breaches},
        redis,
        sessions::{Name, Notebook, Style},
        until,
        variables::number,
        wait::seconds,
    },
    messages::{PATH, send},
};

const RECEIVERS: [&str; 3] = ["r0", "r1", "r2"];
/// The devices at the start: each receiver has a different set of connection styles.
const DEVICES: [(&str, Style); 7] = [
    ("r0", Style::Plain),
    ("r0", Style::Cursors),
    ("r0", Style::Events),
    ("r1", Style::Plain),
    ("r2", Style::Acks),
    ("r2", Style::Cursors),
    ("r2", Style::Plain),
];
/// Time for all messages to arrive, on a slow and busy machine.
const PATIENCE: Duration = seconds(60);

/// A fault that is injected between messages.
#[derive(Debug, Clone, Copy)]
enum Fault {
    ApiKilled,
    ApiStopped,
    ProcessorKilled,
    ProcessorStopped,
    RedisEmptied,
    RedisKilled,
    ChannelCut,
    HistoryDropped,
    NewDevice,
}

const DECK: [Fault; 13] = [
    Fault::ApiKilled,
    Fault::ApiKilled,
    Fault::ApiStopped,
    Fault::ProcessorKilled,
    Fault::ProcessorStopped,
    Fault::RedisEmptied,
    Fault::RedisKilled,
    Fault::ChannelCut,
    Fault::HistoryDropped,
    Fault::HistoryDropped,
    Fault::HistoryDropped,
    Fault::NewDevice,
    Fault::NewDevice,
];

/// Sends to random receivers until the calm begins; the task returns the acknowledged messages.
struct Sender {
    task: JoinHandle<Vec<Name>>,
    count: watch::Receiver<usize>,
}

impl Sender {
    fn start(name: String, around: &Surroundings, mut rng: Rng) -> Self {
        let (counter, count) = watch::channel(0);
        let (client, around) = (Client::builder().timeout(seconds(15)).build().unwrap(), around.clone());
        let task = tokio::spawn(async move {
            let mut sent = Vec::new();
            while !around.calm.is_cancelled() {
                let receiver = rng.choice(RECEIVERS).unwrap();
                let message = message(receiver, &name, sent.len());
                let key = format!("{name} {}", sent.len());
                until(&format!("{message} is acknowledged"), PATIENCE, || {
                    let request = client.post(format!("{}{PATH}", (around.api)(&mut rng)));
                    let request = request.header("idempotency-key", &key).json(&message);
                    async move { request.send().await.is_ok_and(|answer| answer.status() == 200).then_some(()) }
                })
                .await;
                sent.extend(Name::of(&message));
                counter.send_replace(sent.len());
                sleep(Duration::from_millis(rng.u64(0..20))).await;
            }
            sent
        });
        Self { task, count }
    }

    async fn more(&self, count: usize) {
        let wanted = *self.count.borrow() + count;
        let mut counted = self.count.clone();
        tokio::time::timeout(PATIENCE, counted.wait_for(|&count| count >= wanted)).await.unwrap().unwrap();
    }
}

/// The running processes, devices and senders.
struct Scene {
    rng: Rng,
    around: Surroundings,
    /// The devices, and the sampler of the cursors.
    tasks: JoinSet<()>,
    devices: usize,
    senders: Vec<Sender>,
    noted: Arc<Mutex<Vec<Noted>>>,
    /// Messages that were dropped from the history.
    gone: HashSet<Name>,
    addresses: Arc<Mutex<Vec<String>>>,
    apis: Vec<App>,
    processors: Vec<App>,
    world: World,
    stack: Stack,
}

impl Scene {
    async fn start(seed: u64) -> Self {
        let stack = Stack::own("replay", &["--only", "redis"]).await;
        let mut world = World::on(&stack).await.with_postgres().await;
        for (name, value) in [
            // A buffer so small that devices fall behind.
            ("CONNECTION_BUFFER_BYTES", "500"),
            ("PING_INTERVAL_MS", "200"),
            ("STREAM_MAX_AGE_MS", "2000"),
            ("SWEEP_INTERVAL_MS", "1000"),
            ("CLOSE_JITTER_MS", "200"),
        ] {
            world.set(&format!("POSTRIDER_MESSAGES__{name}"), value);
        }
        let start = |role| world.app().role(role).start();
        let (one, two, three, four) = tokio::join!(start("api"), start("api"), start("processor"), start("processor"));
        let (apis, processors) = (vec![one, two], vec![three, four]);
        let addresses = Arc::new(Mutex::new(apis.iter().map(|app| app.api.clone()).collect::<Vec<String>>()));
        let known = addresses.clone();
        let api = Arc::new(move |rng: &mut Rng| {
            let known = known.lock().unwrap();
            known[rng.usize(..known.len())].clone()
        });
        let notebook = Notebook::new(Instant::now(), None);
        let around = Surroundings { api, notebook, calm: CancellationToken::new() };
        let mut rng = Rng::with_seed(seed);
        let senders = ["a", "b"].map(|name| Sender::start(name.to_owned(), &around, rng.fork())).into();
        let (noted, gone) = (Arc::default(), HashSet::new());
        let (tasks, devices) = (JoinSet::new(), 0);
        let mut scene =
            Self { rng, around, tasks, devices, senders, noted, gone, addresses, apis, processors, world, stack };
        DEVICES.into_iter().for_each(|(receiver, style)| scene.device(receiver, style));
        scene.watch();
        scene
    }

    fn device(&mut self, receiver: &str, style: Style) {
        let device = Device::new(self.devices, receiver, style, &self.around, self.rng.u64(..));
        self.devices += 1;
        self.tasks.spawn(device.run());
    }

    /// Samples the receivers' cursors. Each receiver has one, as all its messages are in one
    /// partition.
    fn watch(&mut self) {
        let (database, notebook, noted) = (self.world.database(), self.around.notebook.clone(), self.noted.clone());
        self.tasks.spawn(async move {
            let mut connection = database.connect().await.unwrap();
            loop {
                let rows = sqlx::query_as::<_, (String, i64)>("SELECT receiver_id, delivered FROM message_cursors");
                let places = rows.fetch_all(&mut connection).await.unwrap().into_iter().collect();
                noted.lock().unwrap().push(Noted { at_ms: notebook.now_ms(), places });
                sleep(Duration::from_millis(100)).await;
            }
        });
    }

    async fn step(&mut self, fault: Fault) {
        let (number, count) = (self.rng.usize(..2), self.rng.usize(3..30));
        match fault {
            Fault::ApiKilled | Fault::ApiStopped => {
                let next = self.world.app().role("api").start().await;
                self.addresses.lock().unwrap()[number] = next.api.clone();
                end(std::mem::replace(&mut self.apis[number], next), matches!(fault, Fault::ApiKilled)).await;
            }
            Fault::ProcessorKilled | Fault::ProcessorStopped => {
                let next = self.world.app().role("processor").even_if_not_ready().start().await;
                let killed = matches!(fault, Fault::ProcessorKilled);
                end(std::mem::replace(&mut self.processors[number], next), killed).await;
            }
            Fault::RedisEmptied => drop(redis::run::<String>(&self.world.redis_url, &["FLUSHALL"]).await),
            Fault::RedisKilled => {
                self.stack.ctl(&["kill", "redis"]).await;
                self.senders[number].more(count).await;
                self.stack.ctl(&["start", "redis"]).await;
            }
            Fault::ChannelCut => {
                let _: usize = redis::run(&self.world.redis_url, &["CLIENT", "KILL", "TYPE", "pubsub"]).await;
            }
            Fault::HistoryDropped => self.drop_history().await,
            Fault::NewDevice => {
                let style = if self.rng.bool() { Style::Cursors } else { Style::Events };
                self.device(RECEIVERS[number], style);
            }
        }
        self.senders[number].more(count).await;
    }

    /// Drops messages as the upkeep job drops old days, but keeps the last messages of each
    /// receiver.
    async fn drop_history(&mut self) {
        let kept = self.rng.i64(0..40);
        let mut connection = self.world.database().connect().await.unwrap();
        let make = "BEGIN; CREATE TABLE messages_d20200101 PARTITION OF messages
                    FOR VALUES FROM ('2020-01-01 00:00+00') TO ('2020-01-02 00:00+00')";
        sqlx::raw_sql(make).execute(&mut connection).await.unwrap();
        let age = r#"UPDATE messages SET stored_at = '2020-01-01 12:00+00' FROM message_receivers AS head
                     WHERE head.receiver_id = messages.receiver_id AND "offset" <= head.last - $1 RETURNING value"#;
        let old: Vec<String> = sqlx::query_scalar(age).bind(kept).fetch_all(&mut connection).await.unwrap();
        sqlx::raw_sql("DROP TABLE messages_d20200101; COMMIT").execute(&mut connection).await.unwrap();
        let names = old.iter().filter_map(|value| Name::of(&serde_json::from_str(value).unwrap()));
        self.gone.extend(names);
    }

    /// Returns the messages of the topic, without duplicates.
    async fn truth(&self) -> Truth {
        let (mut truth, mut ids) = (Truth::new(), HashSet::new());
        for record in self.world.kafka.read(&self.world.topic("message")).await {
            let name = Name::of(&record.json()).unwrap();
            if ids.insert(record.header("ce_id").unwrap().to_owned()) {
                let gone = self.gone.contains(&name);
                let sent = Sent { name: name.clone(), offset: record.offset, gone };
                truth.entry(name.receiver).or_default().push(sent);
            }
        }
        truth
    }

    fn breaches(&self, truth: &Truth) -> Vec<(Breach, String)> {
        breaches(&self.around.notebook.sessions(), truth, &self.noted.lock().unwrap())
    }

    /// Ends the load and waits until all devices have all messages. Returns the messages of the
    /// topic, and fails if an acknowledged one is missing there.
    async fn settle(&mut self, seed: u64) -> Truth {
        self.around.calm.cancel();
        let mut acknowledged = Vec::new();
        for sender in self.senders.drain(..) {
            acknowledged.extend(sender.task.await.unwrap());
        }
        let truth = self.truth().await;
        let stored: HashSet<&Name> = truth.values().flatten().map(|sent| &sent.name).collect();
        let lost: Vec<&Name> = acknowledged.iter().filter(|name| !stored.contains(name)).collect();
        assert!(lost.is_empty(), "seed {seed}: acknowledged and not in the topic: {lost:?}");
        let (began, mut found) = (Instant::now(), self.breaches(&truth));
        while !found.is_empty() && began.elapsed() < PATIENCE {
            sleep(Duration::from_millis(100)).await;
            found = self.breaches(&truth);
        }
        assert!(found.is_empty(), "seed {seed}: {found:#?}");
        truth
    }

    /// Waits until the checker reports this breach of a device, with `word` in its description.
    async fn found(&self, breach: Breach, device: &str, word: &str, truth: &Truth) {
        until(&format!("{breach:?} is reported for {device}"), seconds(20), || async {
            let found = self.breaches(truth);
            let fits = |what: &str| what.starts_with(device) && what.contains(word);
            found.iter().any(|(found, what)| *found == breach && fits(what)).then_some(())
        })
        .await;
    }
}

async fn end(app: App, killed: bool) {
    if killed { app.kill().await } else { app.stop().await }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_device_gets_each_message_once_and_in_order_or_a_gap() {
    let seed = number("REPLAY_SEED").unwrap_or_else(|| Rng::new().u64(..1 << 32));
    eprintln!("replay: seed {seed}");
    let mut scene = Scene::start(seed).await;
    let mut deck = Vec::new();
    for _ in 0..number("REPLAY_STEPS").unwrap_or(2 * DECK.len() as u64) {
        if deck.is_empty() {
            deck.extend(DECK);
            scene.rng.shuffle(&mut deck);
        }
        let fault = deck.pop().unwrap();
        scene.step(fault).await;
        eprintln!("replay: {:.1} s, {fault:?}", scene.around.notebook.now_ms() as f32 / 1e3);
    }
    // New devices miss the messages that were dropped.
    scene.step(Fault::HistoryDropped).await;
    RECEIVERS.into_iter().for_each(|receiver| scene.device(receiver, Style::Cursors));
    let mut truth = scene.settle(seed).await;
    let sessions = scene.around.notebook.sessions();
    let gaps = sessions.iter().flat_map(|session| &session.got).filter(|got| got.name.is_none()).count();
    let (sent, got) = (truth.values().map(Vec::len).sum::<usize>(), sessions.iter().map(|session| session.got.len()));
    eprintln!(
        "replay: {sent} messages, {} dropped, {} received over {} connections with {gaps} gaps",
        scene.gone.len(),
        got.sum::<usize>(),
        sessions.len()
    );
    assert!(sent > 100 && gaps > 0, "too few messages or gaps to prove anything");
    faults_on_purpose(&mut scene, &mut truth).await;
}

/// Injects faults that the product cannot detect, and waits until the checker reports them.
async fn faults_on_purpose(scene: &mut Scene, truth: &mut Truth) {
    // Redis carries one receiver's message to another.
    let stray = message("r1", "stray", 0);
    let channel = format!("{}:messages:to:r0", scene.world.prefix);
    let partition = postrider_kafka::partition_of(b"r0", 2);
    let notice = format!("0 {partition} 1000000 -1\n{stray}");
    let heard: usize = redis::run(&scene.world.redis_url, &["PUBLISH", &channel, &notice]).await;
    assert!(heard > 0);
    scene.found(Breach::Foreign, "r0", "stray", truth).await;
    // The history loses a message that it should have.
    let lost: Value = message("r2", "lost", 0);
    send(&scene.apis[0], &lost).await;
    send(&scene.apis[0], &message("r2", "lost", 1)).await;
    *truth = scene.truth().await;
    until("the history has the message", seconds(20), || async {
        let row = "value::json ->> 'senderId' = 'lost' AND value::json ->> 'content' = '0'";
        let delete = format!("DELETE FROM messages WHERE {row}; IF NOT FOUND THEN RAISE 'not yet'; END IF;");
        scene.world.try_sql(&format!("DO $$ BEGIN {delete} END $$")).await.ok()
    })
    .await;
    let device = scene.devices;
    scene.device("r2", Style::Cursors);
    scene.found(Breach::Sequence, &format!("r2-{device}"), "and not", truth).await;
}
