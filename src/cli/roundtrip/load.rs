//! Load test: pushes at a constant rate, then pulls every accepted value.

use std::{collections::BTreeMap, time::Duration};

use axum::{
    body::Bytes,
    http::{Method, StatusCode},
};
use serde_json::json;
use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};

use super::{
    super::{
        api,
        progress::Progress,
        text::{self, print},
    },
    LOOK_EVERY,
    visitor::Visitor,
};

/// Maximum number of requests in flight. If responses are slower, the rate is not reached.
const MAX_IN_FLIGHT: usize = 2_000;
/// Time after the last push within which every accepted value must be visible.
const VISIBLE_WITHIN: Duration = Duration::from_secs(120);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Interval at which requests become due; each tick starts as many as the rate requires.
const TICK: Duration = Duration::from_millis(5);
/// Interval at which the progress is shown.
const SHOW_EVERY: Duration = Duration::from_millis(500);

/// The reason why the load test failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{count} accepted pushes cannot be read; the first is number {first}")]
    Lost { count: usize, first: u64 },
    #[error("{0} requests failed")]
    Failed(usize),
    #[error(transparent)]
    Print(#[from] text::Error),
}

#[derive(Default)]
struct Tally {
    accepted: Vec<(u64, String)>,
    latencies: Vec<Duration>,
    /// Count of each error.
    failed: BTreeMap<String, usize>,
}

impl Tally {
    fn add(&mut self, outcome: (u64, Duration, Result<String, api::Error>)) {
        match outcome {
            (number, took, Ok(position)) => {
                self.accepted.push((number, position));
                self.latencies.push(took);
            }
            (_, _, Err(error)) => *self.failed.entry(error.to_string()).or_default() += 1,
        }
    }

    fn quantile_ms(&mut self, share: f64) -> f64 {
        self.latencies.sort_unstable();
        let at = (self.latencies.len() as f64 * share) as usize;
        self.latencies.get(at.min(self.latencies.len().saturating_sub(1))).map_or(0.0, |took| took.as_secs_f64() * 1e3)
    }
}

/// Runs the load test and prints its results.
pub async fn run(api: &Visitor, rate: u32, length: Duration, failures_allowed: bool) -> Result<(), Error> {
    let (begun, progress) = (Instant::now(), Progress::new());
    let mut tally = push_for(api, rate, length, &progress).await;
    let (sent, failed) = (tally.accepted.len(), tally.failed.values().sum::<usize>());
    let mut lines = format!(
        "pushed     {sent} in {:.1} s, {failed} failed\nlatency    p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms\n",
        begun.elapsed().as_secs_f64(),
        tally.quantile_ms(0.5),
        tally.quantile_ms(0.99),
        tally.quantile_ms(1.0)
    );
    for (error, count) in &tally.failed {
        lines.push_str(&format!("failed     {count} times: {error}\n"));
    }
    progress.hide();
    print(&lines)?;
    let lost = pull_all(api, std::mem::take(&mut tally.accepted), &progress).await;
    progress.hide();
    print(&format!("pulled     {} of {sent}\n", sent - lost.len()))?;
    match (failed, lost.first()) {
        (failed, None) if failed == 0 || failures_allowed => Ok(()),
        (_, Some(&first)) => Err(Error::Lost { count: lost.len(), first }),
        (_, None) => Err(Error::Failed(failed)),
    }
}

async fn push_for(api: &Visitor, rate: u32, length: Duration, progress: &Progress) -> Tally {
    let (mut tally, mut tasks) = (Tally::default(), JoinSet::new());
    let begun = Instant::now();
    let mut shown_at = begun;
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut number = 0;
    while begun.elapsed() < length {
        ticks.tick().await;
        let due = (begun.elapsed().as_secs_f64() * f64::from(rate)) as u64;
        while number < due {
            let api = api.clone();
            tasks.spawn(async move { push(&api, number).await });
            number += 1;
            if tasks.len() >= MAX_IN_FLIGHT
                && let Some(Ok(outcome)) = tasks.join_next().await
            {
                tally.add(outcome);
            }
        }
        while let Some(Ok(outcome)) = tasks.try_join_next() {
            tally.add(outcome);
        }
        if shown_at.elapsed() > SHOW_EVERY {
            shown_at = Instant::now();
            let (done, failed) = (tally.accepted.len(), tally.failed.values().sum::<usize>());
            let seconds = begun.elapsed().as_secs();
            progress.show(&format!("pushed {done}, {failed} failed, second {seconds} of {}", length.as_secs()));
        }
    }
    while let Some(joined) = tasks.join_next().await {
        if let Ok(outcome) = joined {
            tally.add(outcome);
        }
    }
    tally
}

fn key(api: &Visitor, number: u64) -> String {
    format!("load-{}-{number}", api.mark)
}

async fn push(api: &Visitor, number: u64) -> (u64, Duration, Result<String, api::Error>) {
    let begun = Instant::now();
    let body = json!({"key": key(api, number), "value": number, "ttl_seconds": 3600});
    let answer = match timeout(REQUEST_TIMEOUT, api.post("/push", &body)).await {
        Ok(answer) => answer.and_then(|answer| answer.expect(StatusCode::ACCEPTED, "push")),
        Err(_) => Err(api::Error::TimedOut(REQUEST_TIMEOUT)),
    };
    (number, begun.elapsed(), answer.map(|answer| answer.header("postrider-position").to_owned()))
}

/// Pulls every value until it is visible. Returns the numbers still missing at the deadline.
async fn pull_all(api: &Visitor, mut wanted: Vec<(u64, String)>, progress: &Progress) -> Vec<u64> {
    let total = wanted.len();
    let deadline = Instant::now() + VISIBLE_WITHIN;
    loop {
        let mut missing = Vec::new();
        for some in wanted.chunks(64) {
            let pulls: JoinSet<_> =
                some.iter().cloned().map(|(number, position)| pull(api.clone(), number, position)).collect();
            missing.extend(pulls.join_all().await.into_iter().flatten());
            progress.show(&format!("pulling {total} values, {} not visible yet", missing.len()));
        }
        if missing.is_empty() || Instant::now() > deadline {
            return missing.into_iter().map(|(number, _)| number).collect();
        }
        wanted = missing;
        sleep(LOOK_EVERY).await;
    }
}

/// Pulls one value. Returns its number and position if it is not visible yet.
async fn pull(api: Visitor, number: u64, position: String) -> Option<(u64, String)> {
    let path = format!("/pull/{}", key(&api, number));
    let headers = [("postrider-after", position.as_str())];
    let answer = timeout(REQUEST_TIMEOUT, api.call(Method::GET, &path, &headers, Bytes::new())).await;
    let found = matches!(answer, Ok(Ok(answer)) if answer.json()["value"] == number);
    if found { None } else { Some((number, position)) }
}
