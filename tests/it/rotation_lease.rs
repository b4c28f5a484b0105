//! The lease under which one process of a role at a time restarts with a rotated secret.

use std::fs;

use crate::{
    harness::{App, World, redis, until, wait::seconds},
    rotation::{
        DRAINING, Secret, await_refused, await_replaced, has_drained, metric, started, times, watching, with_redis,
    },
};

#[tokio::test]
async fn the_lease_of_a_killed_process_is_taken_over_when_it_expires() {
    let world = World::new().await;
    let secret = Secret::new(&world, "redis", &world.redis_url);
    let start = |delay_ms: &str| {
        let app = with_redis(world.app().role("api"), &secret).env("POSTRIDER_ROTATION__LEASE_MS", "4000");
        app.env("POSTRIDER_DRAIN__READINESS_DELAY_MS", delay_ms).start()
    };
    let (first, mut second) = (start("60000").await, start("0").await);
    let before = started(&second).await;
    // Give the first process the lease before the second one can see the change.
    let lease = format!("{}:rotation:api", world.prefix);
    let _: () = redis::run(&world.redis_url, &["SET", &lease, &holder(&first), "PX", "4000"]).await;
    secret.set(&format!("{}/0", world.redis_url));
    first.await_log(DRAINING, seconds(30)).await;
    first.kill().await;
    second.await_log("rotated files work, waiting for the rotation lease", seconds(30)).await;
    await_replaced(&mut second, before).await;
    second.await_log("rotation lease expired before its holder was ready again", seconds(1)).await;
    second.stop().await;
}

/// Returns the value of the lease key when this process holds it.
fn holder(app: &App) -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    format!("{}/{}", host.trim(), app.pid())
}

#[tokio::test]
async fn a_process_reports_that_it_waits_for_the_lease_and_stops_waiting_when_the_old_content_returns() {
    let world = World::new().await;
    let secret = Secret::new(&world, "redis", &world.redis_url);
    let app = with_redis(world.app().role("api"), &secret).start().await;
    let lease = format!("{}:rotation:api", world.prefix);
    let _: () = redis::run(&world.redis_url, &["SET", &lease, "another", "PX", "600000"]).await;
    secret.set(&format!("{}/0", world.redis_url));
    let waiting = |wanted: f64| {
        let app = &app;
        async move {
            until("the metric reports whether the process waits", seconds(30), || async {
                (metric(app, "postrider_rotation_waiting").await == Some(wanted)).then_some(())
            })
            .await;
        }
    };
    waiting(1.0).await;
    let line = app.await_log("rotated files work, waiting for the rotation lease", seconds(1)).await;
    assert_eq!(line["holder"], "another");
    secret.set(&world.redis_url);
    waiting(0.0).await;
    let _: i64 = redis::run(&world.redis_url, &["DEL", &lease]).await;
    app.await_log("mounted files are those in use again", seconds(1)).await;
    assert!(app.is_ready().await && !has_drained(&app));
    app.stop().await;
}

#[tokio::test]
async fn a_wrong_secret_that_arrives_during_the_drain_for_a_good_one_cancels_the_drain() {
    let world = World::new().await;
    let secret = Secret::new(&world, "redis", &world.redis_url);
    let app = with_redis(world.app().role("api"), &secret).env("POSTRIDER_DRAIN__READINESS_DELAY_MS", "3000");
    let mut app = app.start().await;
    let before = started(&app).await;
    secret.set(&format!("{}/0", world.redis_url));
    app.await_log(DRAINING, seconds(30)).await;
    assert!(!app.is_ready().await);
    secret.set("redis://127.0.0.1:1");
    app.await_log("mounted files changed again, drain called off", seconds(30)).await;
    await_refused(&app, "redis", true).await;
    assert!(app.is_ready().await);
    assert_eq!(started(&app).await, before);
    let lease: i64 = redis::run(&world.redis_url, &["EXISTS", &format!("{}:rotation:api", world.prefix)]).await;
    assert_eq!(lease, 0, "the lease was not released");
    secret.set(&format!("{}/0", world.redis_url));
    await_replaced(&mut app, before).await;
    app.stop().await;
}

#[tokio::test]
async fn a_signal_during_the_drain_for_a_rotation_stops_the_process() {
    let world = World::new().await;
    let secret = Secret::new(&world, "any", "old");
    let app = watching(world.app().role("api"), &[secret.path()]);
    let mut app = app.env("POSTRIDER_DRAIN__READINESS_DELAY_MS", "3000").start().await;
    secret.set("new");
    app.await_log(DRAINING, seconds(30)).await;
    app.sigterm();
    let status = app.exit(seconds(30)).await;
    assert!(status.success(), "{status}\n{}", app.log());
    assert_eq!(times(&app, "starting").len(), 1);
}
