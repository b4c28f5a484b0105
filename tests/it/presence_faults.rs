//! Presence while processes are killed or suspended and Redis loses its data: connected receivers
//! are never reported as disconnected, disconnected ones do not stay, and every change is
//! published.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use crate::{
    harness::{
        App, Stack, World,
        changes::{changes, count, faults, states},
        proxy::{Mode, Proxy},
        redis,
        socket::Socket,
        until,
        wait::seconds,
    },
    presence::{await_changes, await_connections, quick, settled, with_quick},
};

const NONE: Vec<String> = Vec::new();

async fn api(world: &World) -> App {
    world.app().role("api").start().await
}

/// Opens connections of receivers `NAME0`, `NAME1`, … to a process.
async fn connect(app: &App, name: &str, count: usize) -> Vec<Socket> {
    let mut sockets = Vec::new();
    for number in 0..count {
        sockets.push(Socket::plain(&app.api, &format!("{name}{number}")).await);
    }
    sockets
}

/// Polls receivers that stay connected until all processes have answered for 4 s. Fails if one is
/// reported as disconnected, or if that takes longer than `within`.
async fn never_away(apps: &[&App], receivers: &[&str], within: Duration) {
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
async fn when_redis_loses_its_data_connected_receivers_are_never_reported_as_disconnected() {
    let stack = Stack::own("presence", &["--only", "redis"]).await;
    let world = with_quick(World::on(&stack).await.with_postgres().await);
    let (one, two) = (api(&world).await, api(&world).await);
    let (first, second) = (connect(&one, "a", 60).await, connect(&two, "b", 60).await);
    let both = [Socket::plain(&one.api, "c").await, Socket::plain(&two.api, "c").await];
    let names: Vec<String> = (0..60).flat_map(|number| [format!("a{number}"), format!("b{number}")]).collect();
    let mut connected: Vec<&str> = names.iter().map(String::as_str).collect();
    connected.push("c");
    await_changes(&world, &connected).await;
    let since = await_connections(&one, "c", 2).await["since"].clone();
    for _ in 0..2 {
        let _: String = redis::run(&world.redis_url, &["FLUSHALL"]).await;
        one.get("/api/v1/presence/nobody").await.problem(503, "rebuilding");
        never_away(&[&one, &two], &["a0", "b0", "a59", "b59", "c"], seconds(30)).await;
        await_connections(&one, "nobody", 0).await;
    }
    assert_eq!(
        await_connections(&two, "c", 2).await["since"],
        since,
        "`since` changed although the receiver stayed connected"
    );
    assert_eq!(faults(&changes(&world).await, &connected), NONE);
    assert_eq!(count(&changes(&world).await), 121, "an event was published without a change");
    // Disconnects and connects during a Redis outage are published after it.
    stack.ctl(&["stop", "redis"]).await;
    one.get("/api/v1/presence/a0").await.problem(503, "redis_unavailable");
    drop(first);
    let late = Socket::plain(&one.api, "late").await;
    stack.ctl(&["start", "redis"]).await;
    never_away(&[&one, &two], &["b0", "c", "late"], seconds(30)).await;
    await_connections(&two, "a0", 0).await;
    connected.retain(|name| !name.starts_with('a'));
    connected.push("late");
    await_changes(&world, &connected).await;
    drop((second, both, late));
    one.stop().await;
    two.stop().await;
}

#[tokio::test]
async fn a_receiver_that_moves_while_redis_lacks_it_is_not_announced_twice() {
    let stack = Stack::own("presence-moves", &["--only", "redis"]).await;
    let world = with_quick(World::on(&stack).await.with_postgres().await);
    let (one, two) = (api(&world).await, api(&world).await);
    let before = connect(&one, "r", 20).await;
    let names: Vec<String> = (0..20).map(|number| format!("r{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    await_changes(&world, &names).await;
    // Only this process knows that they are connected, and it is suspended before the other one is
    // asked.
    one.signal(Signal::STOP);
    let _: String = redis::run(&world.redis_url, &["FLUSHALL"]).await;
    let after = connect(&two, "r", 20).await;
    await_connections(&two, "r19", 1).await;
    one.signal(Signal::CONT);
    await_connections(&two, "r19", 2).await;
    drop(before);
    await_connections(&two, "r19", 1).await;
    // Once presence is complete in Redis, new receivers are announced.
    let new = Socket::plain(&two.api, "new").await;
    await_changes(&world, &[&names[..], &["new"]].concat()).await;
    assert_eq!(count(&changes(&world).await), 21, "an event was published without a change");
    drop((after, new));
    one.stop().await;
    two.stop().await;
    assert_eq!(faults(&changes(&world).await, &[]), NONE);
}

/// Only Redis and the topic know that receivers were announced: their process is dead or suspended
/// for longer than its lease, and Redis loses its data meanwhile.
#[tokio::test]
async fn what_only_redis_knew_is_restored_from_the_topic() {
    let stack = Stack::own("presence-topic", &["--only", "redis"]).await;
    let world = with_quick(World::on(&stack).await.with_postgres().await);
    let (killed, suspended, other) = (api(&world).await, api(&world).await, api(&world).await);
    let names = |name: &str| (0..20).map(|number| format!("{name}{number}")).collect::<Vec<_>>();
    let (lost, moved, stayed) = (names("lost"), names("moved"), names("stayed"));
    let lost_sockets = connect(&killed, "lost", 20).await;
    let before = (connect(&suspended, "moved", 20).await, connect(&suspended, "stayed", 20).await);
    let connected = |all: &[&[String]]| -> Vec<String> { all.iter().flat_map(|names| names.iter().cloned()).collect() };
    let await_connected = async |all: &[&[String]]| {
        let names = connected(all);
        await_changes(&world, &names.iter().map(String::as_str).collect::<Vec<_>>()).await;
    };
    await_connected(&[&lost, &moved, &stayed]).await;
    suspended.signal(Signal::STOP);
    killed.kill().await;
    let _: String = redis::run(&world.redis_url, &["FLUSHALL"]).await;
    let after = connect(&other, "moved", 20).await;
    // Those without a connection are announced as disconnected, the others not again.
    await_connected(&[&moved]).await;
    for name in &moved {
        assert_eq!(states(&changes(&world).await, name), [true], "{name}");
    }
    suspended.signal(Signal::CONT);
    await_connected(&[&moved, &stayed]).await;
    await_connections(&other, "moved19", 2).await;
    drop((lost_sockets, before));
    await_connections(&other, "moved19", 1).await;
    await_connected(&[&moved]).await;
    for name in &moved {
        assert_eq!(states(&changes(&world).await, name), [true], "{name}");
    }
    drop(after);
    other.stop().await;
    suspended.stop().await;
    await_connected(&[]).await;
}

#[tokio::test]
async fn changes_while_kafka_was_away_are_not_lost_with_redis() {
    let stack = Stack::own("presence-unsent", &["--only", "kafka,redis"]).await;
    let world = with_quick(World::on(&stack).await.with_postgres().await);
    let app = api(&world).await;
    let first = Socket::plain(&app.api, "first").await;
    await_changes(&world, &["first"]).await;
    stack.ctl(&["pause", "kafka"]).await;
    // Wait for each receiver, so that each change is its own batch.
    let mut sockets = Vec::new();
    let names: Vec<String> = (0..120).map(|number| format!("r{number}")).collect();
    for name in &names {
        sockets.push(Socket::plain(&app.api, name).await);
        await_connections(&app, name, 1).await;
    }
    let _: String = redis::run(&world.redis_url, &["FLUSHALL"]).await;
    stack.ctl(&["resume", "kafka"]).await;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    await_changes(&world, &[&names[..], &["first"]].concat()).await;
    drop((first, sockets));
    app.stop().await;
}

/// Returns whether Redis soon has a due event of a receiver in this state.
async fn is_due(redis: &str, receiver: &str, state: &str) -> bool {
    let until = Instant::now() + seconds(1);
    while Instant::now() < until {
        let buckets: Vec<String> = redis::run(redis, &["KEYS", "*due"]).await;
        for key in buckets {
            let due: Vec<String> = redis::run(redis, &["HVALS", &key]).await;
            let is_it =
                |event: &String| event.contains(&format!(" {state} ")) && event.ends_with(&format!(" {receiver}"));
            if due.iter().any(is_it) {
                return true;
            }
        }
    }
    false
}

/// Returns the number of writes of all processes that Redis has applied.
async fn writes(redis: &str) -> u64 {
    let registers: Vec<String> = redis::run(redis, &["KEYS", "*of:*"]).await;
    let mut count = 0;
    for key in registers {
        count +=
            redis::run::<Option<String>>(redis, &["HGET", &key, ""]).await.map_or(0, |marker| marker.parse().unwrap());
    }
    count
}

/// Redis makes a change, but its answer is lost: only Redis knows that the event is due. Then the
/// process writes again, also after a further change of the receiver, and Redis loses everything.
#[tokio::test]
async fn a_change_whose_answer_was_lost_is_published_although_redis_loses_its_data() {
    let stack = Stack::own("presence-answers", &["--only", "kafka,redis"]).await;
    let mut world = with_quick(World::on(&stack).await.with_postgres().await);
    let direct = world.redis_url.clone();
    let [proxy, postgres] = [Proxy::start().await, Proxy::start().await];
    world.reach_through(&proxy, &postgres);
    let app = api(&world).await;
    for then_leaves in [false, true] {
        settled(&world).await;
        let first = Socket::plain(&app.api, "first").await;
        await_changes(&world, &["first"]).await;
        stack.ctl(&["pause", "kafka"]).await;
        let (mut names, mut sockets) = (vec!["first".to_owned()], vec![first]);
        // Often the first answer that is lost is one to another command, and the change is not sent.
        let left = loop {
            assert!(names.len() < 50, "no answer to a change was lost");
            let name = format!("lost{}{then_leaves}", names.len());
            proxy.set(Mode::CutResponses);
            let socket = Socket::plain(&app.api, &name).await;
            let is_due = is_due(&direct, &name, "connected").await;
            let before = writes(&direct).await;
            if is_due && then_leaves {
                // The linger is over before the process can write again.
                drop(socket);
                tokio::time::sleep(Duration::from_millis(700)).await;
            } else {
                sockets.push(socket);
                names.push(name.clone());
            }
            proxy.set(Mode::Pass);
            if is_due {
                until("the process writes again", seconds(10), || async {
                    (writes(&direct).await > before).then_some(())
                })
                .await;
                break then_leaves.then_some(name);
            }
            await_connections(&app, &name, 1).await;
        };
        let _: String = redis::run(&direct, &["FLUSHALL"]).await;
        stack.ctl(&["resume", "kafka"]).await;
        let connected: Vec<_> = names.iter().map(String::as_str).collect();
        await_changes(&world, &connected).await;
        if let Some(left) = left {
            until(&format!("both changes of {left} are published"), seconds(20), || async {
                (states(&changes(&world).await, &left) == [true, false]).then_some(())
            })
            .await;
        }
        drop(sockets);
        await_changes(&world, &[]).await;
    }
    app.stop().await;
}

#[tokio::test]
async fn on_a_cluster_an_emptied_shard_is_restored_and_a_killed_process_is_cleaned_up() {
    let stack = Stack::own("presences", &["--only", "redis", "--redis-cluster"]).await;
    let mut world = with_quick(World::on(&stack).await.with_postgres().await);
    world.set("POSTRIDER_REDIS__URL", stack.get("REDIS_CLUSTER_URLS"));
    world.set("POSTRIDER_REDIS__CLUSTER", "true");
    let (one, two) = (api(&world).await, api(&world).await);
    let (first, second) = (connect(&one, "a", 40).await, connect(&two, "b", 40).await);
    let names: Vec<String> = (0..40).flat_map(|number| [format!("a{number}"), format!("b{number}")]).collect();
    let connected: Vec<&str> = names.iter().map(String::as_str).collect();
    await_changes(&world, &connected).await;
    for node in stack.get("REDIS_CLUSTER_URLS").split(',') {
        assert!(redis::run::<usize>(node, &["DBSIZE"]).await > 0, "a shard has no keys");
        redis::run::<String>(node, &["FLUSHALL"]).await;
        never_away(&[&one, &two], &["a0", "a1", "a2", "a3", "b0", "b1", "b2", "b3", "b39"], seconds(30)).await;
    }
    assert_eq!(count(&changes(&world).await), 80, "an event was published without a change");
    one.kill().await;
    for receiver in ["a0", "a1", "a2", "a3", "a39"] {
        await_connections(&two, receiver, 0).await;
    }
    await_changes(&world, &connected[..].iter().copied().filter(|name| name.starts_with('b')).collect::<Vec<_>>())
        .await;
    drop((first, second));
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
