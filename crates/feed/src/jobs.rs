//! Jobs: fan-out to many followers, backfill, purges and erasure, in steps. Jobs take turns after
//! each step, so that a large job delays small ones by at most one step. The progress of a job is
//! stored after the effects of a step, so that at most one step is repeated after a crash.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use metrics::{counter, gauge};
use postrider_postgres::query::Error;
use sqlx::PgPool;
use tokio::{
    sync::Notify,
    task::{JoinError, JoinSet},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    Config,
    job_steps::JobSteps,
    job_store::{Job, JobStore, Mark, Task},
    timeline::Owner,
    timeline::TimelineWriter,
};

/// Interval at which the table is polled for jobs that other processes added or released.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// Pause of a job that waits for other jobs.
const LATER: Duration = Duration::from_millis(200);
/// Pause of a job whose step failed.
const AFTER_FAILURE: Duration = Duration::from_secs(1);

/// The job runner of a process.
pub struct Jobs {
    store: JobStore,
    worker: Arc<Worker>,
    in_flight: usize,
    added: Arc<Notify>,
    stop: CancellationToken,
}

struct Worker {
    steps: JobSteps,
    timelines: Arc<TimelineWriter>,
}

/// Result of a step.
enum Step {
    More(Mark),
    Done,
    /// Other jobs must finish first.
    Later,
}

impl Jobs {
    pub fn new(
        config: Config,
        pool: PgPool,
        timelines: Arc<TimelineWriter>,
        added: Arc<Notify>,
        stop: CancellationToken,
    ) -> Self {
        let store = JobStore::new(pool.clone(), Uuid::from_u128(fastrand::u128(..)));
        let in_flight = config.jobs_in_flight.max(1);
        let worker = Arc::new(Worker { steps: JobSteps::new(pool, config), timelines });
        Self { store, worker, in_flight, added, stop }
    }

    /// Runs jobs until the stop; then releases the unfinished ones.
    pub async fn run(self) -> Result<(), JoinError> {
        let (mut waiting, mut running) = (VecDeque::new(), JoinSet::new());
        while !self.stop.is_cancelled() {
            if waiting.len() < self.in_flight {
                self.claim(&mut waiting, running.len()).await;
            }
            while running.len() < self.in_flight
                && let Some(job) = waiting.pop_front()
            {
                let worker = self.worker.clone();
                running.spawn(async move {
                    let step = worker.step(&job).await;
                    (job, step)
                });
            }
            let ended = tokio::select! {
                Some(ended) = running.join_next() => ended,
                () = self.added.notified(), if running.len() < self.in_flight => continue,
                () = tokio::time::sleep(POLL_INTERVAL) => continue,
                () = self.stop.cancelled() => break,
            };
            let (job, step) = ended?;
            if let Some(job) = self.settle(job, step).await {
                waiting.push_back(job);
            }
        }
        while let Some(ended) = running.join_next().await {
            let (job, step) = ended?;
            self.settle(job, step).await;
        }
        if let Err(error) = self.store.let_go().await {
            tracing::debug!(error = %error, "failed to release jobs, their claims expire");
        }
        Ok(())
    }

    async fn claim(&self, waiting: &mut VecDeque<Job>, running: usize) {
        match self.store.claim(self.in_flight * 2).await {
            Ok(jobs) => waiting.extend(jobs),
            Err(error) => {
                tracing::debug!(error = %error, "failed to claim jobs, retrying");
                tokio::time::sleep(POLL_INTERVAL).await;
            }
        }
        gauge!("postrider_feed_jobs_in_hand").set((waiting.len() + running) as f64);
    }

    /// Stores the result of a step. Returns the job if this process continues it.
    async fn settle(&self, mut job: Job, step: Result<Step, Error>) -> Option<Job> {
        let stored = match step {
            Ok(Step::More(mark)) => {
                job.mark = mark;
                match self.store.note(&job).await {
                    Ok(true) => return Some(job),
                    stored => stored.map(|_| ()),
                }
            }
            Ok(Step::Done) => {
                counter!("postrider_feed_jobs_done_total", "kind" => job.task.kind()).increment(1);
                self.store.finish(&job).await
            }
            Ok(Step::Later) => self.store.put_off(&job, LATER).await,
            Err(error) => {
                tracing::debug!(error = %error, job.kind = job.task.kind(), job.id, "job step failed, retrying");
                self.store.put_off(&job, AFTER_FAILURE).await
            }
        };
        if let Err(error) = stored {
            tracing::debug!(error = %error, job.id, "job progress not stored, its last step will be repeated");
        }
        None
    }
}

impl Worker {
    async fn step(&self, job: &Job) -> Result<Step, Error> {
        match &job.task {
            Task::FanOut { post_id } => self.fan_out(job, *post_id).await,
            Task::Backfill { user_id } => self.backfill(job, user_id).await,
            Task::Unfollow { user_id } => self.unfollow(job, user_id).await,
            Task::Purge { post_id } => self.purge(job, *post_id).await,
            Task::Rise => self.rise(job).await,
            Task::Fall => self.fall(job).await,
            Task::Erase => self.erase(job).await,
        }
    }

    async fn fan_out(&self, job: &Job, post_id: i64) -> Result<Step, Error> {
        let more = self.insert(&job.author_id, post_id, job.after_user()).await?;
        Ok(more.map_or(Step::Done, |user| Step::More(Mark { user: Some(user), post: None })))
    }

    /// Inserts a post into the feeds of the next followers and adds it to their timelines. Returns
    /// the last follower if there may be more.
    async fn insert(&self, author_id: &str, post_id: i64, after: &str) -> Result<Option<String>, Error> {
        let found = self.steps.fan_out(author_id, post_id, after).await?;
        counter!("postrider_feed_rows_total").increment(found.users.len() as u64);
        let more = found.more();
        self.timelines.add(found.users.into_iter().map(|user| (Owner::User(user), vec![post_id])).collect()).await?;
        Ok(more)
    }

    async fn backfill(&self, job: &Job, user: &str) -> Result<Step, Error> {
        let next = self.steps.backfill(&job.author_id, user, job.mark.post).await?;
        self.timelines.forget(vec![Owner::User(user.to_owned())]).await?;
        Ok(next.map_or(Step::Done, |post| Step::More(Mark { user: None, post: Some(post) })))
    }

    async fn unfollow(&self, job: &Job, user: &str) -> Result<Step, Error> {
        let next = self.steps.unfollow(&job.author_id, user, job.mark.post).await?;
        if let Some(post) = next {
            return Ok(Step::More(Mark { user: None, post: Some(post) }));
        }
        self.timelines.forget(vec![Owner::User(user.to_owned())]).await?;
        self.timelines.clean_of(format!("u{user}")).await;
        Ok(Step::Done)
    }

    async fn purge(&self, job: &Job, post_id: i64) -> Result<Step, Error> {
        let found = self.steps.purge(&job.author_id, post_id, job.after_user()).await?;
        let more = found.more();
        let mut owners: Vec<Owner> = found.users.into_iter().map(Owner::User).collect();
        if more.is_none() {
            owners.push(Owner::Author(job.author_id.clone()));
        }
        self.timelines.remove(owners, post_id).await?;
        match more {
            Some(user) => Ok(Step::More(Mark { user: Some(user), post: None })),
            None => {
                self.timelines.clean_of(format!("p{post_id}")).await;
                Ok(Step::Done)
            }
        }
    }

    /// Drops the followers' timelines, because timelines built earlier do not list the author to
    /// merge.
    async fn rise(&self, job: &Job) -> Result<Step, Error> {
        if job.mark.user.is_none() {
            self.timelines.forget(vec![Owner::Author(job.author_id.clone())]).await?;
        }
        let found = self.steps.followers(&job.author_id, job.after_user()).await?;
        let more = found.more();
        self.timelines.forget(found.users.into_iter().map(Owner::User).collect()).await?;
        match more {
            Some(user) => Ok(Step::More(Mark { user: Some(user), post: None })),
            None => self.steps.turned(&job.author_id, 1, 2).await.map(|()| Step::Done),
        }
    }

    /// Inserts missing rows into followers' feeds, one post after the other.
    async fn fall(&self, job: &Job) -> Result<Step, Error> {
        let at = job.mark.post.unwrap_or(0);
        let (post_id, after) = match &job.mark.user {
            Some(user) => (Some(at), user.as_str()),
            None => (self.steps.next_post(&job.author_id, at).await?, ""),
        };
        let Some(post_id) = post_id else {
            return self.steps.turned(&job.author_id, 3, 0).await.map(|()| Step::Done);
        };
        let user = self.insert(&job.author_id, post_id, after).await?;
        Ok(Step::More(Mark { user, post: Some(post_id) }))
    }

    async fn erase(&self, job: &Job) -> Result<Step, Error> {
        let user = &job.author_id;
        if self.steps.unfollow_all(user).await? || self.steps.delete_posts(user).await? {
            return Ok(Step::More(Mark::default()));
        }
        // Jobs of kinds that only a newer version knows also delay the erasure, because their
        // effects are unknown.
        if self.steps.has_jobs(user).await? {
            return Ok(Step::Later);
        }
        if self.steps.empty_feed(user).await? || self.steps.drop_followers(user).await? {
            return Ok(Step::More(Mark::default()));
        }
        self.timelines.forget(vec![Owner::User(user.clone()), Owner::Author(user.clone())]).await?;
        if !self.steps.forget_account(user).await? {
            return Ok(Step::Later);
        }
        self.timelines.clean_of(format!("u{user}")).await;
        Ok(Step::Done)
    }
}
