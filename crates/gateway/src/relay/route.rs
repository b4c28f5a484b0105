//! One delivery route: sends a record and decides its outcome.

use std::{path::PathBuf, time::Instant};

use axum::http::HeaderMap;
use postrider_kafka::{
    Position,
    consumer::{Delivery, KeyedHandler, Outcome},
    dead_letter::Reason,
};
use postrider_limits::pace::Pace;
use postrider_outbound::{Client, Endpoint, Failure, Guard, Options, parse_header};
use postrider_time::backoff::Backoff;
use tokio_util::sync::CancellationToken;

use super::{
    Config, Problem,
    envelope::Envelope,
    request,
    stats::{DeadLetters, Snapshot, Stats},
};

/// Addresses that a route may connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// All addresses; used by the command `relay`, whose operator names the target.
    Any,
    /// Public addresses, and those that `allow` lists.
    Public,
}

/// Delivers the records of one topic.
pub struct Route {
    client: Client,
    endpoint: Endpoint,
    envelope: Envelope,
    pace: Pace,
    backoff: Backoff,
    retries: u32,
    honour_retry_after: bool,
    stats: Stats,
    stop: CancellationToken,
}

pub(super) fn connectors(config: &Config, access: Access) -> Result<(Client, Endpoint), Problem> {
    config.check()?;
    let mut headers = HeaderMap::from_iter(request::HEADERS);
    for (name, value) in config.headers.iter() {
        let (name, value) = parse_header(name, value.expose()).map_err(|problem| config.problem(problem))?;
        headers.insert(name, value);
    }
    let endpoint = Endpoint::new(config.target_url.expose(), headers);
    let endpoint = endpoint.map_err(|error| config.problem(format!("`target_url`: {error}")))?;
    let options = Options {
        guard: if access == Access::Any { Guard::open() } else { Guard::new(config.allowed()?) },
        timeout: config.timeout(),
        max_idle: config.workers,
        max_retry_after: config.max_retry_delay(),
        ca_file: (!config.ca_file.is_empty()).then(|| PathBuf::from(&config.ca_file)),
    };
    let client = Client::new(&options).map_err(|error| config.problem(format!("`ca_file`: {error}")))?;
    Ok((client, endpoint))
}

impl Route {
    /// Builds a route. After `stop` it sends nothing new.
    pub fn new(config: &Config, access: Access, stop: CancellationToken) -> Result<Self, Problem> {
        let (client, endpoint) = connectors(config, access)?;
        Ok(Self {
            client,
            endpoint,
            envelope: Envelope::new(&config.topic),
            pace: Pace::new(config.rate),
            backoff: config.backoff(),
            retries: config.retries,
            honour_retry_after: config.honour_retry_after,
            stats: Stats::new(&config.name),
            stop,
        })
    }

    /// Returns the error of a configuration, including its URL, headers and files.
    pub fn check(config: &Config, access: Access) -> Result<(), Problem> {
        connectors(config, access).map(drop)
    }

    pub fn snapshot(&self) -> Snapshot {
        self.stats.snapshot()
    }

    /// Returns why records were dead-lettered.
    pub fn dead_letters(&self) -> DeadLetters {
        self.stats.dead_letters()
    }

    /// Returns the target URL without secrets, for logs.
    pub fn target(&self) -> &str {
        self.endpoint.shown()
    }

    async fn send(&self, delivery: &Delivery) -> Result<(), Failure> {
        let (record, partition) = (delivery.record(), delivery.partition());
        let mut headers = self.endpoint.headers(request::MORE_HEADERS);
        request::add_headers(&mut headers, delivery.topic(), partition, &record);
        let body = request::body(&self.envelope, partition, &record);
        let _in_flight = self.stats.begin();
        let began = Instant::now();
        let answered = self.client.post(&self.endpoint, headers, body).await;
        match &answered {
            Ok(_) => self.stats.delivered(began.elapsed()),
            Err(failure) => self.stats.failed(failure.class, began.elapsed()),
        }
        answered.map(drop)
    }

    /// Returns the outcome of a record whose attempt failed; `attempt` is 1 for the first.
    fn after(&self, failure: Failure, attempt: u32) -> Outcome {
        let reason = Reason { class: failure.class, message: failure.message };
        if attempt > self.retries {
            return Outcome::DeadLetter(reason);
        }
        let wanted = failure.retry_after.filter(|_| self.honour_retry_after).unwrap_or_default();
        let pause = self.backoff.delay(attempt, fastrand::f64()).max(wanted);
        tracing::debug!(class = reason.class, pause.ms = pause.as_millis(), "delivery failed: {}", reason.message);
        Outcome::RetryAfter(pause, reason)
    }
}

impl KeyedHandler for Route {
    async fn handle(&self, delivery: &Delivery) -> Outcome {
        // The stop does not wait for a slot of a slow rate; the record stays uncommitted.
        if self.stop.run_until_cancelled(self.pace.slot()).await.is_none() {
            return Outcome::Hold("the process is stopping".to_owned());
        }
        match self.send(delivery).await {
            Ok(()) => Outcome::Done,
            Err(failure) => self.after(failure, delivery.attempt()),
        }
    }

    fn dead_lettered(&self, delivery: &Delivery, reason: &Reason) {
        let (topic, partition) = (delivery.topic().to_owned(), delivery.partition());
        let at = Position { topic, partition, offset: delivery.record().offset(), epoch: 0 };
        self.stats.dead_lettered(reason.class, &reason.message, at);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use postrider_config::SecretUrl;

    fn route(change: impl FnOnce(&mut Config)) -> Route {
        let mut config = Config {
            name: "r".to_owned(),
            topic: "t".to_owned(),
            target_url: SecretUrl::new("http://example.com"),
            ..Config::default()
        };
        change(&mut config);
        Route::new(&config, Access::Public, CancellationToken::new()).unwrap()
    }

    fn failure(retry_after_s: Option<u64>, gone: bool) -> Failure {
        let retry_after = retry_after_s.map(Duration::from_secs);
        Failure { class: "http_503", message: "no".to_owned(), retry_after, gone }
    }

    fn pause(outcome: &Outcome) -> Option<Duration> {
        match outcome {
            Outcome::RetryAfter(pause, _) => Some(*pause),
            _ => None,
        }
    }

    #[test]
    fn three_retries_are_four_attempts_a_second_apart_even_after_http_410() {
        let route = route(|_| {});
        for gone in [false, true] {
            let outcomes = [1, 2, 3, 4].map(|attempt| route.after(failure(None, gone), attempt));
            assert_eq!(outcomes.each_ref().map(pause)[..3], [Some(Duration::from_secs(1)); 3]);
            assert!(matches!(&outcomes[3], Outcome::DeadLetter(reason) if reason.class == "http_503"));
        }
        assert_eq!(route.snapshot().dead_letters, 0, "they count once they are stored");
    }

    #[test]
    fn zero_retries_mean_one_attempt() {
        let route = route(|config| config.retries = 0);
        assert!(matches!(route.after(failure(None, false), 1), Outcome::DeadLetter(_)));
    }

    #[test]
    fn retry_after_can_lengthen_the_delay_but_not_shorten_it() {
        let wait = |route: &Route, wanted| pause(&route.after(failure(Some(wanted), false), 1)).unwrap().as_secs();
        assert_eq!(wait(&route(|_| {}), 7), 7);
        assert_eq!(wait(&route(|config| config.retry_delay_ms = 9_000), 7), 9);
        assert_eq!(wait(&route(|config| config.honour_retry_after = false), 7), 1);
    }

    #[test]
    fn exponential_backoff_doubles_the_delay() {
        let route = route(|config| config.backoff = postrider_time::backoff::Growth::Exponential);
        let pauses = [1, 2, 3].map(|attempt| pause(&route.after(failure(None, false), attempt)).unwrap().as_secs());
        assert_eq!(pauses, [1, 2, 4]);
    }

    #[test]
    fn an_invalid_route_names_its_problem() {
        let config = |url: &str| Config {
            name: "r".to_owned(),
            topic: "t".to_owned(),
            target_url: SecretUrl::new(url),
            ..Config::default()
        };
        let problem = |config: &Config| {
            Route::new(config, Access::Any, CancellationToken::new()).err().map(|problem| problem.to_string()).unwrap()
        };
        assert!(problem(&config("example.com")).contains("`target_url`"));
        let unknown_file = Config { ca_file: "/nowhere.pem".to_owned(), ..config("http://example.com") };
        assert!(problem(&unknown_file).contains("/nowhere.pem"));
    }
}
