//! Presence while Redis loses its data: the same as in `presence_faults`.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::{
    harness::{
        Stack, World,
        changes::{changes, count, faults, states},
        proxy::{Mode, Proxy},
        redis,
        socket::Socket,
        until,
        wait::seconds,
    },
    presence::{await_changes, await_connections, settled, with_quick},
    presence_faults::{api, connect, never_away},
};

const NONE: Vec<String> = Vec::new();

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
