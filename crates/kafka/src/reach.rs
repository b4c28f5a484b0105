//! Checks that Kafka answers before a command uses it, and says why it does not.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rdkafka::{
    ClientContext,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, Consumer, ConsumerContext},
    error::{KafkaError, RDKafkaErrorCode},
};

use super::{
    Config,
    broker::{METADATA_GROUP, ask, deliver_events, without_thread},
};

/// Timeout of one request. After each, the client's events are delivered, which have the reason.
const REQUEST_TIMEOUT: Duration = Duration::from_millis(250);

/// Kafka does not answer.
#[derive(Debug, thiserror::Error)]
#[error("Kafka does not answer at {brokers} (`kafka.brokers`, from {origin}) within {} s: {reason}", .waited.as_secs_f32())]
pub struct Unreachable {
    pub brokers: String,
    /// Source of the setting, such as `POSTRIDER_KAFKA__BROKERS`.
    pub origin: String,
    pub waited: Duration,
    pub reason: String,
}

/// Keeps the last reason for which there was no connection.
#[derive(Default)]
struct LastReason(Mutex<Option<String>>);

impl ClientContext for LastReason {
    fn log(&self, _: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(facility, message, "client that checks Kafka reported an error");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        // That all brokers are down follows from the error of each, which is the reason.
        if error.rdkafka_error_code() != Some(RDKafkaErrorCode::AllBrokersDown) {
            *self.0.lock() = Some(without_thread(reason).to_owned());
        }
    }
}

impl ConsumerContext for LastReason {}

/// Waits until a broker answers. `origin` names the source of `kafka.brokers` in the error.
pub async fn check(config: &Config, origin: &str, patience: Duration) -> Result<(), Unreachable> {
    let (config, begun) = (config.clone(), Instant::now());
    let brokers = config.brokers.join(",");
    let failed = |reason| Unreachable { brokers, origin: origin.to_owned(), waited: patience, reason };
    let tried = tokio::task::spawn_blocking(move || await_answer(&config, begun + patience));
    match tried.await {
        Ok(outcome) => outcome.map_err(failed),
        Err(error) => Err(failed(error.to_string())),
    }
}

fn await_answer(config: &Config, deadline: Instant) -> Result<(), String> {
    let client: BaseConsumer<LastReason> =
        config.observer("check", METADATA_GROUP, LastReason::default()).map_err(|error| error.to_string())?;
    let outcome = loop {
        let patience = REQUEST_TIMEOUT.min(deadline.saturating_duration_since(Instant::now()));
        let answer = ask(&client, &config.topic("messages"), patience.max(Duration::from_millis(1)));
        deliver_events(&client);
        let Err(error) = answer else { break Ok(()) };
        if Instant::now() >= deadline {
            let reason = client.context().0.lock().clone();
            break Err(reason.unwrap_or_else(|| format!("no answer ({error})")));
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    super::discard(client);
    outcome
}
