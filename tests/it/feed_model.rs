//! Feeds against a simple model of them, through whatever happens in between. Seeded: `FEED_SEED`, and `FEED_STEPS` for more of it.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    feed::{all, cached, cached_page},
    feed_writes::{delete, follow, post, unfollow},
    harness::{App, World, stack::off_runtime, until, variables::number, wait::seconds},
};

const USERS: usize = 6;

/// What feeds must be.
#[derive(Default)]
struct Model {
    /// Who follows whom.
    follows: BTreeSet<(String, String)>,
    /// Posts that are there, with their authors.
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

/// Everything that happens by chance.
struct Story {
    world: World,
    api: App,
    processor: Option<App>,
    relay: Option<App>,
    model: Model,
    chance: fastrand::Rng,
}

impl Story {
    async fn begin(seed: u64) -> Self {
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
        let chance = fastrand::Rng::with_seed(seed);
        Self { world, api, processor: Some(processor), relay: Some(relay), model: Model::default(), chance }
    }

    fn user(&mut self) -> String {
        format!("u{}", self.chance.usize(..USERS))
    }

    async fn step(&mut self) {
        let (one, other) = (self.user(), self.user());
        match self.chance.u8(..100) {
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
                if let Some(&id) = self.chance.choice(&ids) {
                    delete(&self.api, &format!("/posts/{id}")).await.expect(200);
                    self.model.posts.remove(&id);
                }
            }
            82..92 => self.reads_show_nothing_that_is_gone(&one).await,
            92..94 => self.erase(&one).await,
            94..96 => self.double().await,
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

    async fn reads_show_nothing_that_is_gone(&self, user: &str) {
        let (shown, may) = (all(&self.api, user, 4).await, self.model.feed(user));
        let surplus: Vec<i64> = shown.into_iter().filter(|id| !may.contains(id)).collect();
        assert_eq!(surplus, [0_i64; 0], "{user} sees what is gone");
    }

    async fn erase(&mut self, user: &str) {
        delete(&self.api, &format!("/users/{user}")).await.expect(202);
        self.model.erase(user);
        self.reads_show_nothing_that_is_gone(user).await;
        until("the erasure is over", seconds(60), || async {
            (self.world.count("feed_erasures").await == 0).then_some(())
        })
        .await;
    }

    /// All that was said is said again, across keys in another order.
    async fn double(&mut self) {
        let topic = self.world.topic("post-events");
        let mut log = self.world.kafka.read(&topic).await;
        self.chance.shuffle(&mut log);
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

    /// After a while every page of every feed is what the model says, out of Postgres and out of Redis.
    async fn ends_well(self) {
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
        // What is in Kafka may still be on its way.
        until("rows and timelines are those of the pages", seconds(60), || async {
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
async fn after_any_story_every_page_of_every_feed_is_that_of_the_model() {
    for _ in 0..2 {
        let seed = number("FEED_SEED").unwrap_or_else(|| fastrand::u64(..));
        eprintln!("feed: seed {seed}");
        let mut story = Story::begin(seed).await;
        for _ in 0..number("FEED_STEPS").unwrap_or(150) {
            story.step().await;
        }
        story.ends_well().await;
    }
}

#[tokio::test]
async fn verify_finds_what_is_wrong_and_repairs_it() {
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
