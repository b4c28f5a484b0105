//! Rotated secrets: a process tests a new secret before it uses it, and one process of a role at a
//! time restarts with it.

use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::{
    harness::{
        App, Stack, World,
        app::Builder,
        redis, until,
        wait::{seconds, until_now},
    },
    kv::push,
};

const REFUSED: &str = "postrider_rotation_refused";
const WARNING: &str = "rotated secret does not work, keeping the secret in use";
pub const DRAINING: &str = "draining to restart with rotated files";

/// A secret that is mounted as a file.
pub struct Secret(PathBuf);

impl Secret {
    pub fn new(world: &World, name: &str, content: &str) -> Self {
        let secret = Self(std::env::temp_dir().join(format!("{}{name}", world.prefix)));
        secret.set(content);
        secret
    }

    pub fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }

    /// Replaces the content in one step, as a kubelet does.
    pub fn set(&self, content: &str) {
        let next = self.0.with_extension("next");
        fs::write(&next, content).unwrap();
        fs::rename(next, &self.0).unwrap();
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Returns a free port outside of the ephemeral range, so that a process can bind it again after it
/// has replaced itself.
fn steady_port() -> u16 {
    loop {
        let port = fastrand::u16(15_000..30_000);
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Configures a process that polls its files often, and keeps its addresses when it replaces
/// itself.
pub fn watching(app: Builder, files: &[&str]) -> Builder {
    app.env("POSTRIDER_ROTATION__FILES", &files.join(","))
        .env("POSTRIDER_ROTATION__INTERVAL_MS", "50")
        .env("POSTRIDER_ROTATION__SPREAD_MS", "0")
        .env("POSTRIDER_HTTP__LISTEN", &format!("127.0.0.1:{}", steady_port()))
        .env("POSTRIDER_MANAGEMENT__LISTEN", &format!("127.0.0.1:{}", steady_port()))
}

/// Like [`watching`], with the URL of Redis from a file.
pub fn with_redis(app: Builder, secret: &Secret) -> Builder {
    let app = app.unset("POSTRIDER_REDIS__URL").env("POSTRIDER_REDIS__URL_FILE", secret.path());
    watching(app, &[secret.path()])
}

/// Waits until the metric reports this part's secret as refused or not.
pub async fn await_refused(app: &App, what: &str, refused: bool) {
    let name = format!("{REFUSED}{{what=\"{what}\"}}");
    let wanted = Some(f64::from(u8::from(refused)));
    until(&format!("{name} is {wanted:?}"), seconds(30), || async {
        (metric(app, &name).await == wanted).then_some(())
    })
    .await;
}

/// Returns a metric of a process, or `None` while the process replaces itself.
pub async fn metric(app: &App, name: &str) -> Option<f64> {
    let text = app.client.get(format!("{}/metrics", app.management)).send().await.ok()?.text().await.ok()?;
    text.lines().find(|line| line.starts_with(name))?.rsplit(' ').next()?.parse().ok()
}

/// Returns the start time of the program that runs in this process now; 0 while it starts.
pub async fn started(app: &App) -> f64 {
    metric(app, "postrider_start_time_seconds").await.unwrap_or_default()
}

/// Waits until the process has replaced itself and is ready.
pub async fn await_replaced(app: &mut App, before: f64) {
    until("the process has replaced itself and is ready", seconds(60), || async {
        let replaced = started(app).await > before;
        (replaced && app.is_ready().await).then_some(())
    })
    .await;
    assert_eq!(app.ended(), None, "{}", app.log());
}

/// Returns the time of each log line with this message.
pub fn times(app: &App, message: &str) -> Vec<String> {
    let log = app.log();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let lines = lines.filter(|line| line["message"] == message);
    lines.map(|line| line["timestamp"].as_str().unwrap().to_owned()).collect()
}

pub fn has_drained(app: &App) -> bool {
    !times(app, DRAINING).is_empty()
}

/// Clients that push in a loop, each time to the next process that is ready.
struct Clients {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicUsize>,
    tasks: JoinSet<Vec<String>>,
}

impl Clients {
    fn of(apps: &[&App]) -> Self {
        let addresses: Arc<[(String, String)]> =
            apps.iter().map(|app| (app.management.clone(), app.api.clone())).collect();
        let (stop, sent) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let mut tasks = JoinSet::new();
        for _ in 0..4 {
            tasks.spawn(push_on(addresses.clone(), stop.clone(), sent.clone()));
        }
        Self { stop, sent, tasks }
    }

    /// Waits for this many more requests.
    async fn more(&self, count: usize) {
        let wanted = self.sent.load(Ordering::Relaxed) + count;
        until_now("more requests", seconds(60), || (self.sent.load(Ordering::Relaxed) >= wanted).then_some(())).await;
    }

    /// Stops the clients and returns the failed requests.
    async fn stop(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        self.tasks.join_all().await.into_iter().flatten().collect()
    }
}

async fn push_on(addresses: Arc<[(String, String)]>, stop: Arc<AtomicBool>, sent: Arc<AtomicUsize>) -> Vec<String> {
    // Without kept connections, because a draining process closes them.
    let client = reqwest::Client::builder().pool_max_idle_per_host(0).timeout(seconds(30)).build().unwrap();
    let mut failed = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let number = sent.fetch_add(1, Ordering::Relaxed);
        let mut ready = None;
        for at in 0..addresses.len() {
            let (management, api) = &addresses[(number + at) % addresses.len()];
            let probe = client.get(format!("{management}/readyz")).send().await;
            if probe.is_ok_and(|answer| answer.status() == 200) {
                ready = Some(api);
                break;
            }
        }
        let Some(api) = ready else {
            failed.push(format!("request {number}: no process is ready"));
            continue;
        };
        let body = json!({"key": format!("k{}", number % 50), "value": number}).to_string();
        let request = client.post(format!("{api}/push")).header("content-type", "application/json").body(body);
        match request.send().await {
            Ok(answer) if answer.status() == 202 => {}
            other => failed.push(format!("request {number}: {other:?}")),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    failed
}

#[tokio::test]
async fn a_wrong_redis_secret_changes_nothing_and_a_working_one_replaces_the_process() {
    let world = World::new().await;
    let secret = Secret::new(&world, "redis", &world.redis_url);
    let app = with_redis(world.app().role("api"), &secret).env("POSTRIDER_DRAIN__READINESS_DELAY_MS", "500");
    let mut app = app.start().await;
    let (before, pid) = (started(&app).await, app.pid());
    let clients = Clients::of(&[&app]);
    let server = world.redis_url.trim_start_matches("redis://");
    let wrongs = [format!("redis://nobody:hunter22@{server}"), "redis://127.0.0.1:1".to_owned(), String::new()];
    for (number, wrong) in wrongs.iter().enumerate() {
        secret.set(wrong);
        // The process warns at each change, and then once a minute.
        until_now("a warning for each change", seconds(30), || {
            (times(&app, WARNING).len() == number + 1).then_some(())
        })
        .await;
        await_refused(&app, "redis", true).await;
        clients.more(50).await;
        let report = app.manage("/readyz?verbose").await.expect(200).json();
        let check = &report["checks"]["rotation"];
        assert_eq!(check["status"], "warning", "{report}");
        assert!(!check["detail"].as_str().unwrap().contains("hunter22"), "{report}");
    }
    assert_eq!(started(&app).await, before);
    assert!(!app.log().contains("hunter22"), "{}", app.log());
    // Restoring the secret in use clears the warning.
    secret.set(&world.redis_url);
    await_refused(&app, "redis", false).await;
    assert_eq!(app.manage("/readyz?verbose").await.json()["checks"]["rotation"]["status"], "ok");
    assert_eq!(clients.stop().await, Vec::<String>::new());
    assert!(!has_drained(&app));
    // The same server under another URL: a changed file is enough.
    secret.set(&format!("{}/0", world.redis_url));
    await_replaced(&mut app, before).await;
    assert_eq!(app.pid(), pid);
    push(&app, "k", &json!(1)).await;
    app.stop().await;
}

#[tokio::test]
async fn a_wrong_or_empty_postgres_secret_is_refused() {
    let world = World::new().await.with_postgres().await;
    let url = world.database_url().to_owned();
    let secret = Secret::new(&world, "postgres", &url);
    let app = world.app().unset("POSTRIDER_POSTGRES__URL").env("POSTRIDER_POSTGRES__URL_FILE", secret.path());
    let mut app = watching(app, &[secret.path()]).start().await;
    let before = started(&app).await;
    let (head, rest) = url.split_once("://").unwrap();
    let (account, address) = rest.rsplit_once('@').unwrap();
    let user = account.split(':').next().unwrap();
    secret.set(&format!("{head}://{user}:hunter22@{address}"));
    await_refused(&app, "postgres", true).await;
    assert!(app.is_ready().await);
    // An empty URL would silently disable the capabilities that need Postgres.
    secret.set("");
    await_refused(&app, "settings", true).await;
    await_refused(&app, "postgres", false).await;
    let comment = json!({"video_id": "v", "user_id": "u", "text": "still here"});
    app.post_json("/api/v1/comments", &comment).await;
    assert!(app.is_ready().await && !has_drained(&app));
    assert!(!app.log().contains("hunter22"), "{}", app.log());
    secret.set(&format!("{url}\n"));
    await_replaced(&mut app, before).await;
    app.stop().await;
}

#[tokio::test]
async fn a_process_whose_old_secret_was_revoked_uses_the_new_one_at_once_without_the_lease() {
    let stack = Stack::own("revoked", &["--only", "redis"]).await;
    let mut world = World::on(&stack).await;
    let url = world.redis_url.clone();
    let account = |password: &'static str| {
        let url = url.clone();
        async move {
            let _: () =
                redis::run(&url, &["ACL", "SETUSER", "app", "on", "resetpass", password, "~*", "&*", "+@all"]).await;
        }
    };
    account(">old").await;
    let with = |password: &str| url.replace("redis://", &format!("redis://app:{password}@"));
    world.set("POSTRIDER_REDIS__URL", &with("old"));
    let secret = Secret::new(&world, "redis", &with("old"));
    let mut app = with_redis(world.app().role("api"), &secret).start().await;
    let before = started(&app).await;
    let lease = format!("{}:rotation:api", world.prefix);
    let _: () = redis::run(&url, &["SET", &lease, "another", "PX", "600000"]).await;
    account(">new").await;
    let _: i64 = redis::run(&url, &["CLIENT", "KILL", "USER", "app"]).await;
    app.await_failing("redis", seconds(30)).await;
    secret.set(&with("wrong"));
    await_refused(&app, "redis", true).await;
    assert!(!has_drained(&app));
    secret.set(&with("new"));
    await_replaced(&mut app, before).await;
    let left: i64 = redis::run(&url, &["PTTL", &lease]).await;
    assert!(left > 0, "the lease of another process was removed");
    app.stop().await;
}

#[tokio::test]
async fn a_secret_is_not_refused_while_its_server_is_down() {
    let stack = Stack::own("away", &["--only", "redis"]).await;
    let world = World::on(&stack).await;
    let secret = Secret::new(&world, "redis", &world.redis_url);
    let mut app = with_redis(world.app().role("api"), &secret).start().await;
    let before = started(&app).await;
    stack.ctl(&["stop", "redis"]).await;
    app.await_failing("redis", seconds(30)).await;
    secret.set(&format!("{}/0", world.redis_url));
    app.await_log("cannot test a rotated secret, a server does not answer", seconds(30)).await;
    assert_eq!(metric(&app, "postrider_rotation_refused{what=\"redis\"}").await, Some(0.0));
    assert!(!has_drained(&app));
    stack.ctl(&["start", "redis"]).await;
    await_replaced(&mut app, before).await;
    app.stop().await;
}

#[tokio::test]
async fn ten_rotations_five_of_them_wrong_fail_no_request_and_restart_one_process_at_a_time() {
    let world = World::new().await;
    let secret = Secret::new(&world, "redis", &world.redis_url);
    let start = || {
        let app = with_redis(world.app().role("api"), &secret);
        app.env("POSTRIDER_DRAIN__READINESS_DELAY_MS", "1000").start()
    };
    let mut apps = [start().await, start().await];
    let pids = apps.each_ref().map(App::pid);
    let pipes_before = apps.each_ref().map(|app| pipes(app.pid()));
    let clients = Clients::of(&apps.each_ref());
    let mut good = world.redis_url.clone();
    for number in 0..5 {
        secret.set(&format!("redis://nobody:wrong{number}@127.0.0.1:1"));
        for app in &apps {
            await_refused(app, "redis", true).await;
        }
        let mut before = Vec::new();
        for app in &apps {
            before.push(started(app).await);
        }
        // The newline is not part of the secret, but it changes the file.
        good.push('\n');
        secret.set(&good);
        for (app, before) in apps.iter_mut().zip(before) {
            await_replaced(app, before).await;
        }
    }
    clients.more(50).await;
    assert_eq!(clients.stop().await, Vec::<String>::new());
    assert_eq!(apps.each_ref().map(App::pid), pids);
    let mut absences = Vec::new();
    for app in &apps {
        let (begins, ends) = (times(app, DRAINING), times(app, "ready"));
        assert_eq!((begins.len(), ends.len()), (5, 6), "{}", app.log());
        absences.extend(begins.into_iter().zip(ends.into_iter().skip(1)));
    }
    absences.sort();
    for pair in absences.windows(2) {
        assert!(pair[0].1 < pair[1].0, "two processes restarted at once: {absences:?}");
    }
    for (app, before) in apps.iter().zip(pipes_before) {
        assert!(pipes(app.pid()) <= before + 4, "the new program inherited open pipes");
    }
    for app in apps {
        app.stop().await;
    }
}

/// Counts the open pipes of a process. A new program inherits those of the Kafka library unless
/// they are closed before.
fn pipes(pid: u32) -> usize {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let targets = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
    targets.filter(|target| target.to_string_lossy().starts_with("pipe:")).count()
}

#[tokio::test]
async fn without_redis_a_relay_waits_a_random_time_and_keeps_its_arguments() {
    let world = World::new().await;
    let secret = Secret::new(&world, "any", "old");
    let topic = world.make_topic("orders", 1).await;
    let words = ["--topic", &topic, "--target-url", "http://127.0.0.1:1/x", "--workers", "3"];
    let app = watching(world.app().relay(words), &[secret.path()]).env("POSTRIDER_REDIS__URL", "redis://127.0.0.1:1");
    let mut app = app.start().await;
    let before = started(&app).await;
    let arguments = fs::read(format!("/proc/{}/cmdline", app.pid())).unwrap();
    secret.set("new");
    await_replaced(&mut app, before).await;
    app.await_log("rotated files work, restarting after a random wait", seconds(1)).await;
    assert_eq!(fs::read(format!("/proc/{}/cmdline", app.pid())).unwrap(), arguments);
    app.stop().await;
}

#[tokio::test]
async fn a_configuration_that_can_no_longer_be_loaded_is_refused() {
    let world = World::new().await;
    let secret = Secret::new(&world, "config.yaml", "kv:\n  batch_records: 400\n");
    let app = watching(world.app().role("api"), &[secret.path()]).env("POSTRIDER_CONFIG", secret.path());
    let mut app = app.start().await;
    let before = started(&app).await;
    secret.set("kv:\n  batch_record: 500\n");
    await_refused(&app, "settings", true).await;
    assert!(app.is_ready().await && !has_drained(&app));
    secret.set("kv:\n  batch_records: 500\n");
    await_replaced(&mut app, before).await;
    app.stop().await;
}
