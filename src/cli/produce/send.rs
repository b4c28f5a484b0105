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
    super::{
        api::{Answer, Api, Error},
        text::note,
    },
    input::Number,
};

/// Code of a record of which the API does not know whether it is stored.
const UNKNOWN: &str = "outcome_unknown";
/// Wait before a request is repeated, if the answer asks for none.
const WAIT: Backoff = Backoff::doubling(Duration::from_millis(500), Duration::from_secs(5));

/// Outcome of a record.
#[derive(Debug, Clone)]
pub enum Outcome {
    Stored {
        topic: String,
        partition: i32,
        offset: i64,
        /// Warnings of the API about the record, such as a field with a misspelt name.
        warnings: Vec<String>,
    },
    Failed(Failure),
}

/// Why a record is not stored, or may not be.
#[derive(Debug, Clone)]
pub struct Failure {
    pub code: String,
    pub detail: String,
    /// Status of the record, or of the request; 0 without an answer.
    status: u16,
    /// True if the record may be stored all the same.
    pub maybe_stored: bool,
    /// True if only this record failed: its own topic does not exist, for example.
    alone: bool,
}

impl Failure {
    fn not_sent(detail: impl Into<String>) -> Self {
        let code = String::new();
        Self { code, detail: detail.into(), status: 503, maybe_stored: false, alone: false }
    }

    fn no_answer(detail: impl Into<String>) -> Self {
        Self { maybe_stored: true, ..Self::not_sent(detail) }
    }

    /// Returns whether the API may store the record later. Proxies answer 502 and 504 while the API
    /// is away.
    fn is_temporary(&self) -> bool {
        matches!(self.status, 429 | 502 | 503 | 504)
    }

    /// Returns whether later records would fail for the same reason. A record that is wrong itself,
    /// being too large for example, says nothing about others.
    pub fn concerns_all(&self) -> bool {
        !self.alone && !matches!(self.status, 400 | 413 | 422)
    }
}

impl Outcome {
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Stored { .. } => None,
            Self::Failed(failure) => Some(failure),
        }
    }

    fn is_temporary(&self) -> bool {
        self.failure().is_some_and(Failure::is_temporary)
    }

    /// Returns the end of the sentence "record 3 …"; `None` if it is stored.
    pub fn reason(&self) -> Option<String> {
        let Failure { code, detail, maybe_stored, .. } = self.failure()?;
        let what = if *maybe_stored { "may be stored" } else { "is not stored" };
        Some(if code.is_empty() { format!("{what}: {detail}") } else { format!("{what}: {code}: {detail}") })
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
    Stored {
        topic: String,
        partition: i32,
        offset: i64,
        #[serde(default)]
        warnings: Vec<String>,
    },
    Failed {
        code: String,
        status: u16,
        error: String,
    },
}

/// The topic that a record of NDJSON names itself.
#[derive(Deserialize)]
struct OwnTopic {
    topic: Option<Box<RawValue>>,
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
    /// True once there was a connection. Until then, an API that cannot be reached is an error at
    /// once, since its URL may be wrong.
    connected: bool,
}

impl Sender {
    pub fn new(api: Api, topic: &str, timeout: Duration) -> Self {
        Self { api, topic: topic.to_owned(), timeout, connected: false }
    }

    /// Sends the records until each is stored or cannot be. Returns their outcomes in order.
    ///
    /// If the API stores some of them only, the others are sent again. A record that may be stored
    /// is only sent again with all others of its request, under the same idempotency key, which
    /// gives it the same event id.
    pub async fn send(&mut self, records: &[(Number, Box<RawValue>)]) -> Result<Vec<(Number, Outcome)>, Error> {
        let deadline = Instant::now() + self.timeout;
        let not_sent = || Outcome::Failed(Failure::not_sent("not sent"));
        let mut outcomes: Vec<Outcome> = records.iter().map(|_| not_sent()).collect();
        let mut maybe_stored = vec![false; records.len()];
        let mut left: Vec<usize> = (0..records.len()).collect();
        let (mut key, mut attempts) = (Uuid::now_v7().to_string(), 0);
        while !left.is_empty() {
            let raw: Vec<&RawValue> = left.iter().map(|&at| &*records[at].1).collect();
            let Attempt { outcomes: found, retry_after } = self.attempt(&raw, &key, deadline).await?;
            attempts += 1;
            let whole = found.iter().all(Outcome::is_temporary);
            let mut again = Vec::new();
            for (at, mut outcome) in left.into_iter().zip(found) {
                if let Outcome::Failed(failure) = &mut outcome {
                    // An earlier attempt may have stored what this one did not.
                    failure.maybe_stored |= maybe_stored[at];
                    maybe_stored[at] = failure.maybe_stored;
                    if failure.is_temporary() && (whole || !failure.maybe_stored) {
                        again.push(at);
                    }
                }
                outcomes[at] = outcome;
            }
            left = again;
            let wait = retry_after.unwrap_or_else(|| WAIT.delay(attempts, 0.0));
            if left.is_empty() || Instant::now() + wait >= deadline {
                break;
            }
            if !whole {
                key = Uuid::now_v7().to_string();
                note(&format!("{} records are sent again, after others of their request that are stored", left.len()));
            }
            sleep(wait).await;
        }
        Ok(records.iter().map(|(number, _)| *number).zip(outcomes).collect())
    }

    async fn attempt(&mut self, records: &[&RawValue], key: &str, deadline: Instant) -> Result<Attempt, Error> {
        let body = serde_json::to_vec(&Body { topic: &self.topic, records }).unwrap_or_default();
        let headers = [("content-type", "application/json"), ("idempotency-key", key)];
        let call = self.api.call(Method::POST, "/produce", &headers, Bytes::from(body));
        match timeout_at(deadline, call).await {
            Ok(Ok(answer)) => {
                self.connected = true;
                Ok(Attempt::of(records, &answer))
            }
            Ok(Err(error)) if error.sent_nothing() => match self.connected {
                true => Ok(Attempt::all(records, &Failure::not_sent(error.to_string()))),
                false => Err(error),
            },
            Ok(Err(error)) => {
                self.connected = true;
                Ok(Attempt::all(records, &Failure::no_answer(error.to_string())))
            }
            Err(_) => {
                let failure = Failure::no_answer(format!("no answer within {} s", self.timeout.as_secs_f32()));
                Ok(Attempt::all(records, &Failure { code: UNKNOWN.to_owned(), ..failure }))
            }
        }
    }
}

impl Attempt {
    fn all(records: &[&RawValue], failure: &Failure) -> Self {
        let outcomes = records.iter().map(|_| Outcome::Failed(failure.clone())).collect();
        Self { outcomes, retry_after: None }
    }

    fn of(records: &[&RawValue], answer: &Answer) -> Self {
        let retry_after = answer.retry_after();
        if matches!(answer.status, StatusCode::OK | StatusCode::MULTI_STATUS)
            && let Ok(Results { results }) = serde_json::from_value(answer.json())
            && results.len() == records.len()
        {
            let outcomes = results.into_iter().zip(records).map(|(part, record)| part.outcome(record));
            return Self { outcomes: outcomes.collect(), retry_after };
        }
        let (status, problem) = (answer.status.as_u16(), answer.problem());
        let detail = if problem.detail.is_empty() { format!("the API answered {status}") } else { problem.detail };
        // Only the API itself, whose errors have a code, knows that it has stored nothing.
        let silent = problem.code.is_empty() && (answer.status.is_success() || answer.status.is_server_error());
        let maybe_stored = silent || problem.code == UNKNOWN;
        let failure = Failure { code: problem.code, detail, status, maybe_stored, alone: false };
        Self { retry_after, ..Self::all(records, &failure) }
    }
}

impl Part {
    fn outcome(self, record: &RawValue) -> Outcome {
        match self {
            Self::Stored { topic, partition, offset, warnings } => {
                Outcome::Stored { topic, partition, offset, warnings }
            }
            Self::Failed { code, status, error } => {
                let own_topic = serde_json::from_str::<OwnTopic>(record.get()).is_ok_and(|own| own.topic.is_some());
                let alone = own_topic && matches!(status, 403 | 404);
                let maybe_stored = code == UNKNOWN;
                Outcome::Failed(Failure { code, detail: error, status, maybe_stored, alone })
            }
        }
    }
}

impl Error {
    /// Returns whether the request failed before any of it was sent.
    fn sent_nothing(&self) -> bool {
        match self {
            Self::Send { source, .. } => source.is_connect(),
            Self::Body { .. } | Self::TimedOut(_) | Self::Answered { .. } => false,
            Self::Invalid { .. } | Self::Url { .. } | Self::Key | Self::Tls(_) => true,
        }
    }
}
