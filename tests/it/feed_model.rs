//! Compares feeds with a simple model after random operations and crashes. `FEED_SEED` sets the
//! seed, `FEED_STEPS` the number of steps.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    feed::{all, cached, cached_page},
    feed_writes::{delete, follow, post, unfollow},
    harness::{App, World, stack::off_runtime, until, variables::number, wait::seconds},
};

const USERS: usize = 6;

/// The expected state of all feeds.
#[derive(Default)]
struct Model {
    /// Pairs of a follower and a followee.
    follows: BTreeSet<(String, String)>,
    /// Posts that are not deleted, with their authors.
    posts: BTreeMap<i64, String>,
}

impl Model {
    fn feed(&self, user: &str) -> Vec<i64> {
        let followed = |author: &String| self.follows.contains(&(user.to_owned(), author.clone()));
        self.posts.iter().rev().filter(|(_, author)| followed(author)).map(|(id, _)| *id).collect()
    }

    fn erase(&mut self, user: &str) {
        self.follows.retain(|(follower, followee)| follower != user && followee != user);
        self.posts.retain(|_, author| author != user);
    }
}

/// A sequence of random operations, and the processes and the model that they change.
struct Scenario {
    world: World,
    api: App,
    processor: Option<App>,
    relay: Option<App>,
    model: Model,
    rng: fastrand::Rng,
}

impl Scenario {
    async fn start(seed: u64) -> Self {
        let mut world = World::new().await.with_postgres().await;
        for (name, value) in [
            ("CELEBRITY_FOLLOWERS", "3"),
            ("INLINE_FOLLOWERS", "1"),
            ("CHUNK_ROWS", "2"),
            ("TIMELINE_IDS", "6"),
            ("BATCH_RECORDS", "7"),
        ] {
            world.set(&format!("POSTRIDER_FEED__{name}"), value);
        }
        let api = world.app().role("api").start().await;
        let (processor, relay) = (world.app().role("processor").start().await, world.app().role("relay").start().await);
        let rng = fastrand::Rng::with_seed(seed);
        Self { world, api, processor: Some(processor), relay: Some(relay), model: Model::default(), rng }
    }

    fn user(&mut self) -> String {
        format!("u{}", self.rng.usize(..USERS))
    }

    async fn step(&mut self) {
        let (one, other) = (self.user(), self.user());
        match self.rng.u8(..100) {
            0..40 => {
                let id = post(&self.api, &one, "x").await;
                self.model.posts.insert(id, one);
            }
            40..60 if one != other => {
                follow(&self.api, &one, &other).await;
                self.model.follows.insert((one, other));
            }
            60..72 if one != other => {
                unfollow(&self.api, &one, &other).await;
                self.model.follows.remove(&(one, other));
            }
            72..82 => {
                let ids: Vec<i64> = self.model.posts.keys().copied().collect();
                if let Some(&id) = self.rng.choice(&ids) {
                    delete(&self.api, &format!("/posts/{id}")).await.expect(200);
                    self.model.posts.remove(&id);
                }
            }
            82..92 => self.assert_no_surplus_posts(&one).await,
            92..94 => self.erase(&one).await,
            94..96 => self.duplicate_events().await,
            96 => {
                self.processor.take().unwrap().kill().await;
                self.processor = Some(self.world.app().role("processor").even_if_not_ready().start().await);
            }
            97 => {
                self.relay.take().unwrap().kill().await;
                self.relay = Some(self.world.app().role("relay").even_if_not_ready().start().await);
            }
            98 => self.flush().await,
            _ => {}
        }
    }

    async fn assert_no_surplus_posts(&self, user: &str) {
        let (shown, allowed) = (all(&self.api, user, 4).await, self.model.feed(user));
        let surplus: Vec<i64> = shown.into_iter().filter(|id| !allowed.contains(id)).collect();
        assert_eq!(surplus, [0_i64; 0], "{user} sees posts that are deleted or not followed");
    }

    async fn erase(&mut self, user: &str) {
        delete(&self.api, &format!("/users/{user}")).await.expect(202);
        self.model.erase(user);
        self.assert_no_surplus_posts(user).await;
        until("the erasure is done", seconds(60), || async {
            (self.world.count("feed_erasures").await == 0).then_some(())
        })
        .await;
    }

    /// Writes up to 20 events of the topic again, in another order across keys.
    async fn duplicate_events(&mut self) {
        let topic = self.world.topic("post-events");
        let mut log = self.world.kafka.read(&topic).await;
        self.rng.shuffle(&mut log);
        for record in log.iter().take(20) {
            self.world.kafka.write_in(&topic, record.partition, &[record.value.clone().unwrap()]).await;
        }
    }

    async fn flush(&self) {
        let mut redis = crate::harness::redis::connect(&self.world.redis_url).await;
        let pattern = format!("{}:feed:*", self.world.prefix);
        let keys: Vec<String> = redis::cmd("KEYS").arg(pattern).query_async(&mut redis).await.unwrap();
        if !keys.is_empty() {
            redis::cmd("DEL").arg(keys).query_async::<()>(&mut redis).await.unwrap();
        }
    }

    /// Waits until every page of every feed matches the model, from Postgres and from Redis.
    async fn assert_settled(self) {
        for user in (0..USERS).map(|number| format!("u{number}")) {
            let expected = self.model.feed(&user);
            for limit in [100, 4] {
                until(&format!("{user}'s feed is {expected:?} by {limit}"), seconds(60), || async {
                    (all(&self.api, &user, limit).await == expected).then_some(())
                })
                .await;
            }
            let first = cached_page(&self.api, &user, 4).await;
            assert_eq!(first, expected.iter().copied().take(first.len()).collect::<Vec<_>>(), "{user} in Redis");
        }
        until("no jobs are left", seconds(30), || async {
            (self.world.count("feed_jobs").await == 0 && self.world.count("outbox").await == 0).then_some(())
        })
        .await;
        // Events in Kafka may not be processed yet.
        until("rows and timelines match the pages", seconds(60), || async {
            let mut verify = self.world.command();
            verify.args(["feed", "verify", "--all", "--output", "json"]);
            let output = off_runtime(move || verify.output().unwrap()).await;
            if !output.status.success() {
                println!("{}", String::from_utf8_lossy(&output.stdout));
            }
            output.status.success().then_some(())
        })
        .await;
        for app in [Some(self.api), self.processor, self.relay].into_iter().flatten() {
            app.stop().await;
        }
    }
}

#[tokio::test]
async fn after_random_operations_every_page_of_every_feed_matches_the_model() {
    for _ in 0..2 {
        let seed = number("FEED_SEED").unwrap_or_else(|| fastrand::u64(..));
        eprintln!("feed: seed {seed}");
        let mut scenario = Scenario::start(seed).await;
        for _ in 0..number("FEED_STEPS").unwrap_or(150) {
            scenario.step().await;
        }
        scenario.assert_settled().await;
    }
}

#[tokio::test]
async fn verify_finds_and_repairs_wrong_rows_and_timelines() {
    let world = World::new().await.with_postgres().await;
    let seed = ["feed", "seed", "--users", "30", "--follows", "4", "--posts", "200"];
    let output = world.command().args(seed).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let app = world.app().start().await;
    let verify = |more: &'static [&'static str]| {
        let output = world.command().args(["feed", "verify", "--output", "json"]).args(more).output().unwrap();
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let number = |name: &str| report[name].as_u64().unwrap();
        (output.status.success(), number("missing_rows"), number("surplus_rows"), number("wrong_timelines"))
    };
    assert_eq!(verify(&["--all"]), (true, 0, 0, 0));
    let user = "u7";
    cached(&app, user).await;
    world
        .sql(
            "DELETE FROM feed_rows WHERE user_id = 'u7' AND post_id = (SELECT max(post_id) FROM feed_rows WHERE user_id = 'u7');
             INSERT INTO feed_rows (user_id, post_id) VALUES ('u7', 9000000), ('u8', 9000000)",
        )
        .await;
    assert_eq!(verify(&["--all"]), (false, 1, 2, 1));
    assert_eq!(verify(&["--user", "u8"]), (false, 0, 1, 0));
    assert_eq!(verify(&["--all", "--repair"]), (true, 1, 2, 1));
    assert_eq!(verify(&["--sample", "10"]), (true, 0, 0, 0));
    assert_eq!(verify(&["--all"]), (true, 0, 0, 0));
    app.stop().await;
}
