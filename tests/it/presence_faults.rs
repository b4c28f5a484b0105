//! Presence while processes are killed or suspended: connected receivers are never reported as
//! disconnected, disconnected ones do not stay, and every change is published.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use crate::{
    harness::{
        App, World,
        changes::{changes, count, faults, states},
        redis,
        socket::Socket,
        until,
        wait::seconds,
    },
    presence::{await_changes, await_connections, quick, settled},
};

const NONE: Vec<String> = Vec::new();

pub async fn api(world: &World) -> App {
    world.app().role("api").start().await
}

/// Opens connections of receivers `NAME0`, `NAME1`, … to a process.
pub async fn connect(app: &App, name: &str, count: usize) -> Vec<Socket> {
    let mut sockets = Vec::new();
    for number in 0..count {
        sockets.push(Socket::plain(&app.api, &format!("{name}{number}")).await);
    }
    sockets
}

/// Polls receivers that stay connected until all processes have answered for 4 s. Fails if one is
/// reported as disconnected, or if that takes longer than `within`.
pub async fn never_away(apps: &[&App], receivers: &[&str], within: Duration) {
    let (begun, mut known_since) = (Instant::now(), None);
    loop {
        let mut all = true;
        for app in apps {
            for receiver in receivers {
                let answer = app.get(&format!("/api/v1/presence/{receiver}")).await;
                if answer.status == 503 {
                    all = false;
                    continue;
                }
                assert_eq!(answer.expect(200).json()["state"], "connected", "{receiver} at {}", app.api);
            }
        }
        let since = if all { known_since.get_or_insert_with(Instant::now).elapsed() } else { Duration::ZERO };
        if !all {
            known_since = None;
        }
        if since >= seconds(4) {
            return;
        }
        assert!(begun.elapsed() < within, "presence was not rebuilt in time");
    }
}

#[tokio::test]
async fn connections_of_a_killed_process_end_and_those_of_other_processes_stay() {
    let world = quick().await;
    let (one, two, three) = (api(&world).await, api(&world).await, api(&world).await);
    settled(&world).await;
    let lost = connect(&one, "r", 150).await;
    let kept = Socket::plain(&two.api, "r0").await;
    // This receiver has disconnected, but its process is killed within the linger, before it
    // publishes that.
    Socket::plain(&one.api, "r1").await.leave().await;
    await_connections(&three, "r0", 2).await;
    await_connections(&three, "r149", 1).await;
    one.kill().await;
    for receiver in ["r1", "r149", "r70"] {
        let found = await_connections(&two, receiver, 0).await;
        assert!(found["last_seen"].is_string(), "{found}");
    }
    await_connections(&three, "r0", 1).await;
    await_changes(&world, &["r0"]).await;
    assert_eq!(count(&changes(&world).await), 150 + 149, "not one event for each change");
    drop((lost, kept));
    two.stop().await;
    three.stop().await;
}

#[tokio::test]
async fn when_the_process_that_takes_over_dies_the_next_one_takes_over() {
    let world = quick().await;
    let (one, two) = (api(&world).await, api(&world).await);
    settled(&world).await;
    let lost = connect(&one, "r", 20).await;
    await_connections(&two, "r19", 1).await;
    let registry = format!("{}:presence:processes", world.prefix);
    let before = until("both are registered", seconds(10), || async {
        let names: Vec<String> = redis::run(&world.redis_url, &["ZRANGE", &registry, "0", "-1"]).await;
        (names.len() == 2).then_some(names)
    })
    .await;
    let owner: Vec<String> = redis::run(&world.redis_url, &["KEYS", &format!("{}:presence:*of:*", world.prefix)]).await;
    let owner = owner[0].rsplit(':').next().unwrap().to_owned();
    assert!(before.contains(&owner), "{owner} {before:?}");
    one.kill().await;
    // As if a process had claimed the entries and died.
    let soon = (postrider_time::clock::now_ms() + 3_000).to_string();
    let _: i64 = redis::run(&world.redis_url, &["ZREM", &registry, &owner]).await;
    let _: i64 = redis::run(&world.redis_url, &["ZADD", &registry, &soon, &format!("leaving:{owner}")]).await;
    await_connections(&two, "r19", 0).await;
    await_changes(&world, &[]).await;
    let left: Vec<String> =
        redis::run(&world.redis_url, &["KEYS", &format!("{}:presence:*{owner}", world.prefix)]).await;
    assert_eq!(left, NONE);
    // A process that is missing from the registry leaves no receivers behind either.
    let ghosts = connect(&two, "g", 20).await;
    let three = api(&world).await;
    await_connections(&three, "g19", 1).await;
    two.kill().await;
    let _: i64 = redis::run(&world.redis_url, &["DEL", &registry]).await;
    await_connections(&three, "g19", 0).await;
    await_changes(&world, &[]).await;
    drop((lost, ghosts));
    three.stop().await;
}

#[tokio::test]
async fn a_process_that_was_suspended_publishes_its_connected_receivers_again() {
    let world = quick().await;
    let (one, two) = (api(&world).await, api(&world).await);
    let sockets = connect(&one, "r", 40).await;
    let names: Vec<String> = (0..40).map(|number| format!("r{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    await_changes(&world, &names).await;
    one.signal(Signal::STOP);
    await_connections(&two, "r39", 0).await;
    await_changes(&world, &[]).await;
    one.signal(Signal::CONT);
    await_connections(&two, "r39", 1).await;
    await_connections(&two, "r0", 1).await;
    await_changes(&world, &names).await;
    assert_eq!(states(&changes(&world).await, "r7"), [true, false, true]);
    drop(sockets);
    one.stop().await;
    two.stop().await;
}

#[tokio::test]
async fn after_random_connects_and_crashes_presence_is_right_and_every_change_is_published() {
    const RECEIVERS: usize = 8;
    let world = quick().await;
    let mut apps = vec![api(&world).await, api(&world).await, api(&world).await];
    settled(&world).await;
    let mut sockets: Vec<(usize, usize, Socket)> = Vec::new();
    let mut random = fastrand::Rng::with_seed(7);
    for round in 0..4 {
        for _ in 0..60 {
            if sockets.is_empty() || random.u8(..) < 140 {
                let (receiver, at) = (random.usize(..RECEIVERS), random.usize(..apps.len()));
                sockets.push((receiver, at, Socket::plain(&apps[at].api, &format!("r{receiver}")).await));
            } else {
                sockets.swap_remove(random.usize(..sockets.len()));
            }
        }
        let at = round % apps.len();
        let next = api(&world).await;
        let former = std::mem::replace(&mut apps[at], next);
        sockets.retain(|(_, connected_to, _)| *connected_to != at);
        if round % 2 == 0 { former.kill().await } else { former.stop().await }
    }
    let open = |receiver: usize| sockets.iter().filter(|(owner, ..)| *owner == receiver).count();
    let names: Vec<String> = (0..RECEIVERS).map(|receiver| format!("r{receiver}")).collect();
    for (receiver, name) in names.iter().enumerate() {
        for app in &apps {
            await_connections(app, name, open(receiver) as u64).await;
        }
    }
    let connected: Vec<&str> =
        names.iter().enumerate().filter(|(receiver, _)| open(*receiver) > 0).map(|(_, name)| name.as_str()).collect();
    await_changes(&world, &connected).await;
    assert!(!connected.is_empty() && changes(&world).await.len() > RECEIVERS);
    drop(sockets);
    for app in apps {
        app.stop().await;
    }
    assert_eq!(faults(&changes(&world).await, &[]), NONE, "{}", json!(names));
}
