//! Sends records in batches, and repeats what the API refuses for the moment.

use std::time::Duration;

use axum::{
    body::Bytes,
    http::{Method, StatusCode},
};
use postrider_time::backoff::Backoff;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::time::{Instant, sleep, timeout_at};
use uuid::Uuid;

use super::{
    super::api::{Answer, Api, Error},
    input::Number,
};

/// Wait before a request is repeated, if the answer asks for none.
const WAIT: Backoff = Backoff::doubling(Duration::from_millis(500), Duration::from_secs(5));

/// What became of a record.
#[derive(Debug)]
pub enum Outcome {
    Stored {
        topic: String,
        partition: i32,
        offset: i64,
    },
    Failed {
        code: String,
        detail: String,
        /// Status of the record, or of the request; 0 without an answer.
        status: u16,
    },
}

impl Outcome {
    fn failed(code: &str, detail: impl Into<String>, status: u16) -> Self {
        Self::Failed { code: code.to_owned(), detail: detail.into(), status }
    }

    /// Returns the end of the sentence "record 3 …"; `None` if it is stored.
    pub fn reason(&self) -> Option<String> {
        match self {
            Self::Stored { .. } => None,
            Self::Failed { code, detail, .. } if code == "outcome_unknown" => {
                Some(format!("may be stored: {code}: {detail}"))
            }
            Self::Failed { code, detail, .. } if code.is_empty() => Some(format!("is not stored: {detail}")),
            Self::Failed { code, detail, .. } => Some(format!("is not stored: {code}: {detail}")),
        }
    }

    /// Returns whether later records would fail for the same reason: it is none of the record's
    /// own, such as its size.
    pub fn concerns_all(&self) -> bool {
        matches!(self, Self::Failed { status, .. } if !matches!(status, 400 | 413 | 422))
    }
}

#[derive(Serialize)]
struct Body<'a> {
    topic: &'a str,
    records: &'a [&'a RawValue],
}

#[derive(Deserialize)]
struct Results {
    results: Vec<Part>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Part {
    Stored { topic: String, partition: i32, offset: i64 },
    Failed { code: String, status: u16, error: String },
}

/// The answer to one request, for each of its records.
struct Attempt {
    outcomes: Vec<Outcome>,
    retry_after: Option<Duration>,
}

/// Client that writes to one topic.
pub struct Sender {
    api: Api,
    topic: String,
    timeout: Duration,
    /// True once the API has answered. Until then, an API that cannot be reached is an error at
    /// once, since its URL may be wrong.
    answered: bool,
}

impl Sender {
    pub fn new(url: &str, topic: &str, timeout: Duration) -> Result<Self, Error> {
        Ok(Self { api: Api::new(url)?, topic: topic.to_owned(), timeout, answered: false })
    }

    /// Sends the records until each is stored or cannot be. Returns their outcomes in order.
    ///
    /// If the API stores some of them only, the others are sent again. A record whose outcome is
    /// unknown is only sent again with all others of its request, under the same idempotency key,
    /// which gives it the same event id.
    pub async fn send(&mut self, records: &[(Number, Box<RawValue>)]) -> Result<Vec<(Number, Outcome)>, Error> {
        let deadline = Instant::now() + self.timeout;
        let mut outcomes: Vec<Option<Outcome>> = records.iter().map(|_| None).collect();
        let mut left: Vec<usize> = (0..records.len()).collect();
        let (mut key, mut attempts) = (Uuid::now_v7().to_string(), 0);
        while !left.is_empty() {
            let raw: Vec<&RawValue> = left.iter().map(|&at| &*records[at].1).collect();
            let Attempt { outcomes: found, retry_after } = self.attempt(&raw, &key, deadline).await?;
            attempts += 1;
            let whole = found.iter().all(is_temporary);
            let mut again = Vec::new();
            for (at, outcome) in left.into_iter().zip(found) {
                if is_temporary(&outcome) && (whole || !is_unknown(&outcome)) {
                    again.push(at);
                }
                outcomes[at] = Some(outcome);
            }
            left = again;
            if !whole {
                key = Uuid::now_v7().to_string();
            }
            let wait = retry_after.unwrap_or_else(|| WAIT.delay(attempts, 0.0));
            if left.is_empty() || Instant::now() + wait >= deadline {
                break;
            }
            sleep(wait).await;
        }
        let outcomes = outcomes.into_iter().map(|one| one.unwrap_or_else(|| Outcome::failed("", "not sent", 0)));
        Ok(records.iter().map(|(number, _)| *number).zip(outcomes).collect())
    }

    async fn attempt(&mut self, records: &[&RawValue], key: &str, deadline: Instant) -> Result<Attempt, Error> {
        let body = serde_json::to_vec(&Body { topic: &self.topic, records }).unwrap_or_default();
        let headers = [("content-type", "application/json"), ("idempotency-key", key)];
        let call = self.api.call(Method::POST, "/produce", &headers, Bytes::from(body));
        let answer = match timeout_at(deadline, call).await {
            Ok(Ok(answer)) => answer,
            // Nothing was sent: the connection is the first one, and there is none.
            Ok(Err(error)) if !self.answered => return Err(error),
            Ok(Err(error)) => return Ok(Attempt::all(records, &Outcome::failed("", error.to_string(), 503))),
            Err(_) => {
                let detail = format!("no answer within {} s", self.timeout.as_secs_f32());
                return Ok(Attempt::all(records, &Outcome::failed("outcome_unknown", detail, 503)));
            }
        };
        self.answered = true;
        Ok(Attempt::of(records, &answer))
    }
}

impl Attempt {
    fn all(records: &[&RawValue], outcome: &Outcome) -> Self {
        let same = |_: &&RawValue| match outcome {
            Outcome::Failed { code, detail, status } => Outcome::failed(code, detail, *status),
            Outcome::Stored { .. } => Outcome::failed("", "not sent", 0),
        };
        Self { outcomes: records.iter().map(same).collect(), retry_after: None }
    }

    fn of(records: &[&RawValue], answer: &Answer) -> Self {
        let retry_after = answer.retry_after();
        if matches!(answer.status, StatusCode::OK | StatusCode::MULTI_STATUS)
            && let Ok(Results { results }) = serde_json::from_value(answer.json())
            && results.len() == records.len()
        {
            let outcomes = results.into_iter().map(|part| match part {
                Part::Stored { topic, partition, offset } => Outcome::Stored { topic, partition, offset },
                Part::Failed { code, status, error } => Outcome::Failed { code, detail: error, status },
            });
            return Self { outcomes: outcomes.collect(), retry_after };
        }
        let (status, problem) = (answer.status.as_u16(), answer.problem());
        let detail = if problem.detail.is_empty() { format!("the API answered {status}") } else { problem.detail };
        Self { retry_after, ..Self::all(records, &Outcome::failed(&problem.code, detail, status)) }
    }
}

/// Returns whether the API may store the record later.
fn is_temporary(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Failed { status: 429 | 503, .. })
}

fn is_unknown(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Failed { code, .. } if code == "outcome_unknown")
}
