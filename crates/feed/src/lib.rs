//! Feeds: Postgres stores each post and follow together with its event, and every post appears
//! exactly once in the feed of each follower of its author, despite crashes. Posts of authors with
//! many followers are merged when a feed is read. As soon as a deletion or an
//! unfollow is answered, feeds no longer show the deleted post or the posts of the unfollowed
//! author.

pub mod codes;
mod config;
mod event_id;
mod fan_out;
mod feeds;
mod group;
mod http;
mod job_steps;
mod job_store;
mod jobs;

mod model;
mod plans;
mod project;
mod reads;
mod record;
mod seed;
mod timeline;
mod trim;
mod upkeep;
mod verify;
mod writes;

pub use config::Config;
pub use event_id::with_number;
pub use http::{routes, short_cuts};
pub use jobs::Jobs;
pub use plans::{Explained, explain, explain_hot};
pub use project::Projector;
pub use seed::{Plan, Shape, seed};
pub use timeline::TimelineWriter;
pub use trim::Trimmer;
pub use upkeep::{count_jobs, keep as keep_memory};
pub use verify::{Report, Verifier, VerifyError, Whose};

use std::{sync::Arc, time::Duration};

use postrider_http::Config as HttpConfig;
use postrider_kafka::{self as kafka, TopicSpec};
use postrider_outbox_backlog::{Backlog, Hint};
use postrider_process::drain::{self, PartError};
use postrider_redis::{Config as RedisConfig, Redis};
use sqlx::PgPool;
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

use self::{
    feeds::Feeds,
    group::{Group, Grouping},
    timeline::{Asking, NewestEpoch},
    writes::{Follows, Posts, Unfollows},
};

/// The topic of events about posts and follows, before the prefix.
pub const TOPIC: &str = "post-events";
/// The consumer group of the projection, before the prefix.
pub const GROUP: &str = "postrider-feed";

/// Returns the topic of the capability.
pub fn topic_specs(config: &Config, kafka: &kafka::Config) -> Vec<TopicSpec> {
    let setting = |name, value: &str| (name, value.to_owned());
    vec![TopicSpec {
        name: kafka.topic(TOPIC),
        partitions: config.partitions,
        settings: vec![
            setting("cleanup.policy", "delete"),
            setting("retention.ms", &config.topic_retention_ms.to_string()),
        ],
        // Events of one author share a key, so compaction would keep only the last of them.
        required: vec![("cleanup.policy", "delete")],
        remedy: "set `feed.partitions` to the number of partitions of the topic".to_owned(),
    }]
}

/// The part of the capability that the api role runs. Cheap to clone.
#[derive(Clone)]
pub struct Feed {
    inner: Arc<Inner>,
}

struct Inner {
    config: Config,
    http: HttpConfig,
    /// `None` without Postgres.
    desk: Option<Desk>,
}

/// Database for posts and follows, and the limit on outbox rows that wait for Kafka.
pub struct Storage {
    pub pool: PgPool,
    pub backlog: Arc<Backlog>,
}

/// Everything that the routes need to read and write.
struct Desk {
    pool: PgPool,
    backlog: Arc<Backlog>,
    posts: Group<Posts>,
    follows: Group<Follows>,
    unfollows: Group<Unfollows>,
    feeds: Feeds,
    hint: Arc<Hint>,
}

/// Tasks that run beside the routes; the role owns them.
pub struct Background {
    posts: Grouping<Posts>,
    follows: Grouping<Follows>,
    unfollows: Grouping<Unfollows>,
    asking: Asking,
    /// The epoch of timelines to follow, and where it is.
    epoch: (Arc<NewestEpoch>, PgPool),
}

impl Feed {
    /// Creates the routes' state. Without storage, posts and follows are neither accepted nor read.
    pub fn new(
        config: Config,
        http: HttpConfig,
        storage: Option<Storage>,
        redis_config: &RedisConfig,
        redis: watch::Receiver<Option<Redis>>,
    ) -> (Self, Option<Background>) {
        let (desk, background) = match storage {
            None => (None, None),
            Some(storage) => {
                let (desk, background) = Desk::new(&config, storage, redis_config, redis);
                (Some(desk), Some(background))
            }
        };
        (Self { inner: Arc::new(Inner { config, http, desk }) }, background)
    }
}

impl Desk {
    fn new(
        config: &Config,
        Storage { pool, backlog }: Storage,
        redis_config: &RedisConfig,
        redis: watch::Receiver<Option<Redis>>,
    ) -> (Self, Background) {
        let hint = Arc::new(Hint::new(pool.clone()));
        let (rows, in_flight) = (config.group_rows, config.groups_in_flight);
        let (posts, posts_grouping) = Group::new(Posts(pool.clone()), hint.clone(), rows, in_flight);
        let (follows, follows_grouping) = Group::new(Follows(pool.clone()), hint.clone(), rows, in_flight);
        let (unfollows, unfollows_grouping) = Group::new(Unfollows(pool.clone()), hint.clone(), rows, in_flight);
        let newest = Arc::<NewestEpoch>::default();
        let (feeds, asking) = Feeds::new(config.clone(), pool.clone(), newest.clone(), redis_config, redis);
        let background = Background {
            posts: posts_grouping,
            follows: follows_grouping,
            unfollows: unfollows_grouping,
            asking,
            epoch: (newest, pool.clone()),
        };
        (Self { pool, backlog, posts, follows, unfollows, feeds, hint }, background)
    }
}

impl Background {
    /// Runs until the routes are dropped and their writes and reads are finished. Those that did
    /// not finish within `grace` after the stop are abandoned.
    pub async fn run(self, stop: CancellationToken, grace: Duration) -> Result<(), PartError> {
        let mut tasks = JoinSet::new();
        tasks.spawn(self.posts.until_closed());
        tasks.spawn(self.follows.until_closed());
        tasks.spawn(self.unfollows.until_closed());
        tasks.spawn(self.asking.until_closed());
        let (newest, pool) = self.epoch;
        tokio::select! {
            ended = drain::until_done(tasks, stop, grace) => ended,
            never = newest.follow(&pool) => match never {},
        }
    }
}
