//! Messages while the channels in Redis that announce them are down, cut or silent.

use serde_json::Value;

use crate::{
    harness::{
        Stack, World,
        inbox::{Times, faults, message},
        proxy::{Mode, Proxy},
        redis,
        socket::Socket,
        until,
        wait::{seconds, until_now},
    },
    messages::{send, stored},
    messages_faults::{Device, NONE, Sender, apis, finish},
};

#[tokio::test]
async fn without_redis_messages_are_slightly_late_and_none_is_lost() {
    const RECEIVERS: [&str; 2] = ["r0", "r1"];
    let stack = Stack::own("messages", &["--only", "redis"]).await;
    let world = World::on(&stack).await.with_postgres().await;
    // While Redis is up, the sweep finds nothing: its interval is ten minutes.
    let start = |role| world.app().role(role).env("POSTRIDER_MESSAGES__SWEEP_INTERVAL_MS", "600000").start();
    let (app, processor) = (start("api").await, start("processor").await);
    let (_to, at) = apis(&[&app]);
    let sender = Sender::start("a", &RECEIVERS, at.clone());
    let devices = RECEIVERS.map(|receiver| Device::start(receiver, true, at.clone()));
    sender.more(40).await;
    for kind in ["pubsub", "normal"] {
        let _: usize = redis::run(&world.redis_url, &["CLIENT", "KILL", "TYPE", kind]).await;
        sender.more(40).await;
    }
    let _: String = redis::run(&world.redis_url, &["FLUSHALL"]).await;
    sender.more(40).await;
    stack.ctl(&["stop", "redis"]).await;
    sender.more(40).await;
    let late = message("r0", "late", 1);
    send(&app, &late).await;
    let socket = Socket::cursors(&app.api, "r0", "0").await;
    until_now("the message arrives without Redis", seconds(5), || socket.seen().data().contains(&late).then_some(()))
        .await;
    stack.ctl(&["start", "redis"]).await;
    sender.more(40).await;
    let mut sent = sender.stop().await;
    sent.push(late);
    finish(&app, &RECEIVERS, &mut sent).await;
    for device in devices {
        device.check(&sent).await;
    }
    app.stop().await;
    processor.stop().await;
}

#[tokio::test]
async fn messages_missed_while_the_channel_was_down_arrive_within_a_second_of_its_return() {
    let stack = Stack::own("channel", &["--only", "redis"]).await;
    let world = World::on(&stack).await.with_postgres().await;
    let start = |role| world.app().role(role).env("POSTRIDER_MESSAGES__SWEEP_INTERVAL_MS", "600000").start();
    let (app, processor) = (start("api").await, start("processor").await);
    let mut sockets = Vec::new();
    for number in 0..50 {
        sockets.push(Socket::cursors(&app.api, &format!("r{number}"), "").await);
    }
    let channels = |pattern: String| {
        let url = world.redis_url.clone();
        async move { redis::run::<Vec<String>>(&url, &["PUBSUB", "CHANNELS", &pattern]).await.len() }
    };
    let pattern = format!("{}:messages:to:*", world.prefix);
    assert_eq!(channels(pattern.clone()).await, 50);
    stack.ctl(&["stop", "redis"]).await;
    for number in 0..50 {
        send(&app, &message(&format!("r{number}"), "s", 1)).await;
    }
    stack.ctl(&["start", "redis"]).await;
    until("all channels are subscribed again", seconds(10), || async {
        (channels(pattern.clone()).await == 50).then_some(())
    })
    .await;
    until_now("all receivers have the message", seconds(1), || {
        sockets.iter().all(|socket| socket.count() == 1).then_some(())
    })
    .await;
    // The next message is announced.
    send(&app, &message("r7", "s", 2)).await;
    until_now("the announced message arrives", seconds(2), || (sockets[7].count() == 2).then_some(())).await;
    drop(sockets);
    until("no channel is subscribed", seconds(5), || async { (channels(pattern.clone()).await == 0).then_some(()) })
        .await;
    app.stop().await;
    processor.stop().await;
}

#[tokio::test]
async fn unannounced_messages_are_announced_when_redis_is_back_or_by_the_next_processor() {
    let world = World::new().await.with_postgres().await;
    let proxy = Proxy::start().await;
    let through = world.redis_through(&proxy);
    let role = |role| world.app().role(role);
    // A sweep runs every ten minutes: a message that arrives earlier was announced, or its missing
    // announcement was reported.
    let app = role("api").env("POSTRIDER_MESSAGES__SWEEP_INTERVAL_MS", "600000").start().await;
    let mut processor = role("processor").env("POSTRIDER_REDIS__URL", &through).start().await;
    // A busy sender keeps the processor announcing.
    let (_to, at) = apis(&[&app]);
    let sender = Sender::start("busy", &["somebody"], at);
    let socket = Socket::cursors(&app.api, "r", "").await;
    send(&app, &message("r", "s", 0)).await;
    socket.frames(1).await;
    let (mut round, mut number) = (0, 0);
    while round < 2 {
        let unannounced = processor.metric("postrider_messages_unannounced_total").await;
        proxy.set(Mode::Down);
        number += 1;
        send(&app, &message("r", "s", number)).await;
        stored(&app, "r", number + 1).await;
        // The counter increases once the announcement has failed.
        until("the announcement failed", seconds(60), || async {
            (processor.metric("postrider_messages_unannounced_total").await > unannounced).then_some(())
        })
        .await;
        if socket.count() > number {
            // The api was still looking for what the round before had left unannounced, and found this message as well.
            assert!(number < 6, "announcements come through");
            proxy.set(Mode::Pass);
            continue;
        }
        if round == 0 {
            proxy.set(Mode::Pass);
        } else {
            processor.kill().await;
            processor = role("processor").start().await;
        }
        until_now("the message arrives", seconds(60), || (socket.count() == number + 1).then_some(())).await;
        round += 1;
    }
    sender.stop().await;
    app.stop().await;
    processor.stop().await;
}

#[tokio::test]
async fn a_cut_channel_loses_no_message_and_delays_none_until_a_sweep() {
    let stack = Stack::own("cut", &["--only", "redis"]).await;
    let world = World::on(&stack).await.with_postgres().await;
    let app = world.app().env("POSTRIDER_MESSAGES__SWEEP_INTERVAL_MS", "600000").start().await;
    let socket = Socket::cursors(&app.api, "r", "").await;
    let mut sent = Vec::new();
    for number in 0..300 {
        if number % 100 == 50 {
            let cut: usize = redis::run(&world.redis_url, &["CLIENT", "KILL", "TYPE", "pubsub"]).await;
            assert!(cut > 0, "no connection was killed");
        }
        let message = message("r", "s", number);
        send(&app, &message).await;
        sent.push(message);
        // A sweep would come after ten minutes.
        until_now("the message arrives", seconds(60), || (socket.count() == sent.len()).then_some(())).await;
    }
    assert_eq!(faults("r", &sent, &socket.seen().data(), Times::Once), NONE);
    app.stop().await;
}

#[tokio::test]
async fn a_channel_that_hangs_is_detected_and_reconnected() {
    let world = World::new().await.with_postgres().await;
    let proxy = Proxy::start().await;
    let through = world.redis_through(&proxy);
    let app = world
        .app()
        .role("api")
        .env("POSTRIDER_REDIS__URL", &through)
        .env("POSTRIDER_MESSAGES__SWEEP_INTERVAL_MS", "600000")
        .start()
        .await;
    let processor = world.app().role("processor").start().await;
    let socket = Socket::cursors(&app.api, "r", "").await;
    send(&app, &message("r", "s", 0)).await;
    socket.frames(1).await;
    for round in 0..2 {
        proxy.set(Mode::MuteResponses);
        send(&app, &message("r", "s", 2 * round + 1)).await;
        // A heartbeat each second, a second for its answer, and half a second until the next check.
        until_now("the message arrives without an announcement", seconds(5), || {
            (socket.count() == 2 * round + 2).then_some(())
        })
        .await;
        proxy.set(Mode::Pass);
        let pattern = format!("{}:messages:to:r", world.prefix);
        until("the channel is subscribed again", seconds(5), || async {
            let channels: Vec<String> = redis::run(&world.redis_url, &["PUBSUB", "CHANNELS", &pattern]).await;
            (channels.len() == 1).then_some(())
        })
        .await;
        send(&app, &message("r", "s", 2 * round + 2)).await;
        until_now("the message is announced", seconds(2), || (socket.count() == 2 * round + 3).then_some(())).await;
    }
    let sent: Vec<Value> = (0..5).map(|number| message("r", "s", number)).collect();
    assert_eq!(socket.seen().data(), sent);
    app.stop().await;
    processor.stop().await;
}
