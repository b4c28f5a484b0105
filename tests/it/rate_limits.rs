//! Rates of requests and bytes per caller.

use std::time::Instant;

use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    auth::{BOOTSTRAP, get, locked_world, make},
    harness::{
        Answer, App, World,
        proxy::{Mode, Proxy},
        until,
        wait::seconds,
    },
};

async fn from(app: &App, address: &str) -> Answer {
    app.request(Method::GET, "/", &[("x-forwarded-for", address)], "").await
}

#[tokio::test]
async fn ten_callers_have_their_limits_over_three_processes_together() {
    const RATE: f64 = 40.0;
    let mut world = locked_world().await;
    world.set("POSTRIDER_LIMITS__REQUESTS_PER_SECOND", "40");
    let (one, two, three) =
        tokio::join!(world.app().role("api").start(), world.app().role("api").start(), world.app().role("api").start());
    let apps = [one, two, three];
    let mut keys = Vec::new();
    for number in 0..10 {
        let subject = format!("caller{number}");
        let (_, key) = make(&apps[0], json!({"scopes": ["metrics"], "subject": subject})).await;
        for app in &apps {
            until("the key is known", seconds(10), || async {
                (get(app, &key, "/").await.status != 401).then_some(())
            })
            .await;
        }
        keys.push(key);
    }
    // More than the limit from each caller, on all processes. What is accepted depends only on the time.
    let callers = keys.iter().map(|key| {
        let apps = &apps;
        async move {
            let began = Instant::now();
            let (mut accepted, mut refused_at) = (0.0, 0.0);
            while began.elapsed() < seconds(5) {
                let answers = futures_util::future::join_all(apps.iter().map(|app| get(app, key, "/"))).await;
                for answer in answers {
                    match answer.status {
                        200 => accepted += 1.0,
                        _ => {
                            answer.problem(429, "rate_limited");
                            refused_at = began.elapsed().as_secs_f64();
                        }
                    }
                }
            }
            (accepted, refused_at, began.elapsed().as_secs_f64())
        }
    });
    for (caller, (accepted, refused_at, took)) in futures_util::future::join_all(callers).await.into_iter().enumerate()
    {
        // The burst is a second's worth, of which the wait for the keys took some.
        let most = RATE * (took + 1.0) * 1.05 + 1.0;
        assert!(accepted <= most, "caller {caller}: {accepted} in {took} s, {most} at most");
        // When a request is refused, everything until then has been given out.
        let least = RATE * refused_at * 0.95 - 1.0;
        assert!(
            refused_at > 0.0 && accepted >= least,
            "caller {caller}: {accepted} until {refused_at} s, {least} at least"
        );
    }
    for app in apps {
        assert_eq!(app.metric("postrider_rate_limit_local").await, Some(0.0));
        app.stop().await;
    }
}

#[tokio::test]
async fn without_authentication_addresses_are_limited_and_answers_say_where_they_stand() {
    let mut world = World::new().await;
    world.set("POSTRIDER_LIMITS__REQUESTS_PER_SECOND", "2");
    world.set("POSTRIDER_LIMITS__BURST_SECONDS", "30");
    world.set("POSTRIDER_HTTP__TRUSTED_PROXIES", "127.0.0.0/8");
    let app = world.app().role("api").start().await;
    let first = from(&app, "192.0.2.1").await.expect(200);
    assert_eq!(first.header("ratelimit-policy"), r#""requests";q=60;w=30"#);
    let left = |answer: &Answer| -> u32 {
        let text = answer.header("ratelimit").strip_prefix(r#""requests";r="#).unwrap().to_owned();
        text.split(';').next().unwrap().parse().unwrap()
    };
    assert!(left(&first) >= 58, "{first:?}");
    let refused = until("the burst is used up", seconds(30), || async {
        let answer = from(&app, "192.0.2.1").await;
        (answer.status != 200).then_some(answer)
    })
    .await;
    assert_eq!((left(&refused), refused.header("retry-after")), (0, "1"));
    let problem = refused.problem(429, "rate_limited");
    assert_eq!(problem["detail"], "a caller may send 2 requests per second (`limits`)");
    // Shortcuts past the router are limited too, health is not, and others are not affected.
    let headers = [("x-forwarded-for", "192.0.2.1"), ("content-type", "application/json")];
    let mut statuses = Vec::new();
    for _ in 0..6 {
        statuses.push(app.request(Method::POST, "/produce", &headers, "{}").await.status);
    }
    assert!(statuses.contains(&429), "{statuses:?}");
    for _ in 0..80 {
        app.request(Method::GET, "/health", &headers, "").await.expect(200);
    }
    from(&app, "192.0.2.2").await.expect(200);
    app.stop().await;
}

#[tokio::test]
async fn bytes_are_limited_whether_or_not_their_number_is_known_before() {
    let mut world = World::new().await;
    world.set("POSTRIDER_LIMITS__BYTES_PER_SECOND", "1000");
    world.set("POSTRIDER_LIMITS__BURST_SECONDS", "600");
    let app = world.app().role("api").start().await;
    let send = async |length: usize, streamed: bool| {
        let text = json!({"key": "k", "value": "x".repeat(length)}).to_string();
        let body = match streamed {
            true => reqwest::Body::wrap_stream(futures_util::stream::iter([Ok::<_, std::io::Error>(text)])),
            false => text.into(),
        };
        app.request(Method::POST, "/push", &[("content-type", "application/json")], body).await
    };
    for streamed in [false, true] {
        send(350_000, streamed).await.expect(202);
    }
    until("the bytes of the stream are charged", seconds(10), || async {
        (send(1, false).await.status == 429).then_some(())
    })
    .await;
    let problem = send(1, true).await.problem(429, "rate_limited");
    assert_eq!(problem["detail"], "a caller may send 1000 bytes per second (`limits`)");
    app.stop().await;
}

#[tokio::test]
async fn while_redis_is_away_the_limit_holds_per_process_and_a_metric_says_so() {
    let mut world = World::new().await.with_postgres().await;
    let (redis, postgres) = (Proxy::start().await, Proxy::start().await);
    world.reach_through(&redis, &postgres);
    world.set("POSTRIDER_LIMITS__REQUESTS_PER_SECOND", "1");
    world.set("POSTRIDER_LIMITS__BURST_SECONDS", "600");
    let (one, two) = tokio::join!(world.app().role("api").start(), world.app().role("api").start());
    one.get("/").await.expect(200);
    redis.set(Mode::Down);
    let used_up = async |app: &App| {
        let mut accepted = 0;
        let begun = Instant::now();
        while app.get("/").await.status == 200 {
            accepted += 1;
        }
        (accepted, begun.elapsed().as_secs())
    };
    for app in [&one, &two] {
        let (accepted, took) = used_up(app).await;
        assert!((590..=610 + took).contains(&accepted), "{accepted} in {took} s");
        assert_eq!(app.metric("postrider_rate_limit_local").await, Some(1.0));
    }
    redis.set(Mode::Pass);
    until("the limit is shared again", seconds(30), || async {
        one.get("/").await;
        (one.metric("postrider_rate_limit_local").await == Some(0.0)).then_some(())
    })
    .await;
    one.get("/").await.expect(200);
    one.stop().await;
    two.stop().await;
}

#[tokio::test]
async fn limits_are_off_unless_they_are_configured() {
    let world = locked_world().await;
    let app = world.app().role("api").start().await;
    let answer = get(&app, BOOTSTRAP, "/").await.expect(200);
    assert_eq!([answer.header("ratelimit"), answer.header("ratelimit-policy")], ["", ""]);
    assert_eq!(answer.json()["name"], Value::from("postrider"));
    app.stop().await;
}
