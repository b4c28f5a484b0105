//! Every acknowledged post is in each follower's feed exactly once, even if processes and Postgres
//! crash while it is written.

use std::{collections::BTreeSet, sync::Arc};

use serde_json::json;
use tokio::{sync::watch, task::JoinSet};

use crate::{
    feed::all,
    feed_writes::follow,
    harness::{App, Stack, World, until, wait::seconds},
};

/// Posts until it is stopped; an attempt without an answer is retried with the same idempotency
/// key.
struct Posters {
    tasks: JoinSet<Vec<i64>>,
    stop: Arc<std::sync::atomic::AtomicBool>,
    count: watch::Receiver<usize>,
}

impl Posters {
    fn start(authors: usize, api: watch::Receiver<String>) -> Self {
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (counter, count) = watch::channel(0);
        let client = reqwest::Client::builder().timeout(seconds(15)).build().unwrap();
        let mut tasks = JoinSet::new();
        for author in 0..authors {
            let (stop, counter, client, api) = (stop.clone(), counter.clone(), client.clone(), api.clone());
            tasks.spawn(async move {
                let mut acknowledged = Vec::new();
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let key = format!("{author}-{}", acknowledged.len());
                    let id = until(&format!("{key} is acknowledged"), seconds(60), || {
                        let request = client.post(format!("{}/posts", *api.borrow())).header("idempotency-key", &key);
                        let request = request.json(&json!({"author_id": format!("a{author}"), "content": key}));
                        async move {
                            let answer = request.send().await.ok().filter(|answer| answer.status() == 202)?;
                            answer.json::<serde_json::Value>().await.ok()?["post_id"].as_i64()
                        }
                    })
                    .await;
                    acknowledged.push(id);
                    counter.send_modify(|count| *count += 1);
                }
                acknowledged
            });
        }
        Self { tasks, stop, count }
    }

    async fn more(&self, count: usize) {
        let wanted = *self.count.borrow() + count;
        let mut counted = self.count.clone();
        tokio::time::timeout(seconds(90), counted.wait_for(|&count| count >= wanted)).await.unwrap().unwrap();
    }

    async fn stop(self) -> BTreeSet<i64> {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let ids: Vec<i64> = self.tasks.join_all().await.into_iter().flatten().collect();
        let unique: BTreeSet<i64> = ids.iter().copied().collect();
        assert_eq!(unique.len(), ids.len(), "an id was assigned twice");
        unique
    }
}

#[tokio::test]
async fn no_acknowledged_post_is_lost_or_duplicated_when_processes_are_killed_and_postgres_crashes() {
    let stack = Stack::own("feed-faults", &["--only", "postgres"]).await;
    let world = World::on(&stack).await.with_postgres().await;
    let start = |role: &'static str| world.app().role(role).start();
    let (mut api, mut relay, mut processor) = (start("api").await, start("relay").await, start("processor").await);
    const AUTHORS: usize = 8;
    for author in 0..AUTHORS {
        for follower in 0..5 {
            follow(&api, &format!("f{follower}"), &format!("a{author}")).await;
        }
    }
    let (address, addresses) = watch::channel(api.api.clone());
    let posters = Posters::start(AUTHORS, addresses);
    for _ in 0..2 {
        posters.more(150).await;
        relay.kill().await;
        posters.more(50).await;
        relay = start("relay").await;
        processor.kill().await;
        posters.more(100).await;
        processor = start("processor").await;
        api.kill().await;
        api = start("api").await;
        address.send_replace(api.api.clone());
        posters.more(100).await;
        stack.ctl(&["restart", "postgres", "--immediate"]).await;
    }
    posters.more(100).await;
    let expected: Vec<i64> = posters.stop().await.into_iter().rev().collect();
    for follower in 0..5 {
        let user = format!("f{follower}");
        let found = until(&format!("{user} has as many posts as were acknowledged"), seconds(60), || async {
            Some(all_or_none(&api, &user).await).filter(|found| found.len() >= expected.len())
        })
        .await;
        let lost: Vec<_> = expected.iter().filter(|id| !found.contains(id)).collect();
        assert!(lost.is_empty(), "{user} lacks {lost:?}");
        assert_eq!(found, expected, "{user} has more posts, or in another order");
    }
    assert_eq!(world.count("posts").await, expected.len() as i64, "every attempt without an answer was retried");
    let output = world.command().args(["feed", "verify", "--all"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    for app in [api, relay, processor] {
        app.stop().await;
    }
}

async fn all_or_none(app: &App, user: &str) -> Vec<i64> {
    match app.get(&format!("/feeds/{user}?limit=1")).await.status {
        200 => all(app, user, 100).await,
        _ => Vec::new(),
    }
}
