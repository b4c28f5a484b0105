//! Tries rotated Kafka settings before they are used.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use postrider_config::trial::Fault;
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

/// Timeout for the first answer of a broker.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Time after which a rejection counts. Earlier ones may come from a broker that has not received
/// the change yet.
const REJECTION_DELAY: Duration = Duration::from_secs(2);
/// Timeout of one request. After each, the client is checked for the reason that there was no
/// answer.
const REQUEST_TIMEOUT: Duration = Duration::from_millis(500);

/// Last reason for which a broker rejected this client.
#[derive(Default)]
struct Rejections(Mutex<Option<String>>);

impl Rejections {
    fn last(&self) -> Option<String> {
        self.0.lock().clone()
    }
}

impl ClientContext for Rejections {
    fn log(&self, _: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(facility, message, "client testing a rotated secret reported an error");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        use RDKafkaErrorCode as E;
        tracing::debug!(error = %error, reason, "client testing a rotated secret reported an error");
        if matches!(
            error.rdkafka_error_code(),
            Some(E::Authentication | E::SaslAuthenticationFailed | E::SSL | E::UnsupportedSASLMechanism)
        ) {
            *self.0.lock() = Some(without_thread(reason).to_owned());
        }
    }
}

impl ConsumerContext for Rejections {}

type Client = BaseConsumer<Rejections>;

/// Connects with a new client until a broker answers, then checks that the account may see these
/// topics.
pub async fn try_out(config: &Config, topics: Vec<String>) -> Result<(), Fault> {
    let config = config.clone();
    let tried = tokio::task::spawn_blocking(move || {
        let client = config.observer("rotation", METADATA_GROUP, Rejections::default());
        let client = client.map_err(|error| Fault::Refused(error.to_string()))?;
        let outcome = await_answer(&client, &config.topic("messages"))
            .and_then(|()| topics.iter().try_for_each(|topic| check_access(&client, topic)));
        super::discard(client);
        outcome
    });
    tried.await.unwrap_or_else(|error| Err(Fault::Unreachable(error.to_string())))
}

fn await_answer(client: &Client, topic: &str) -> Result<(), Fault> {
    let begun = Instant::now();
    loop {
        if ask(client, topic, REQUEST_TIMEOUT).is_ok() {
            return Ok(());
        }
        deliver_events(client);
        if let Some(reason) = client.context().last().filter(|_| begun.elapsed() > REJECTION_DELAY) {
            return Err(Fault::Refused(reason));
        }
        if begun.elapsed() > ANSWER_TIMEOUT {
            return Err(Fault::Unreachable(format!("no broker answered within {} s", ANSWER_TIMEOUT.as_secs())));
        }
    }
}

/// Checks that the account may see a topic. A missing topic, or one without a leader, is not a
/// fault of the settings.
fn check_access(client: &Client, topic: &str) -> Result<(), Fault> {
    let metadata = client.fetch_metadata(Some(topic), ANSWER_TIMEOUT);
    let metadata = metadata.map_err(|error| Fault::Unreachable(error.to_string()))?;
    let found = metadata.topics().iter().find(|found| found.name() == topic);
    match found.and_then(|found| found.error()).map(RDKafkaErrorCode::from) {
        Some(RDKafkaErrorCode::TopicAuthorizationFailed) => {
            Err(Fault::Refused(format!("the account is not authorized for topic `{topic}`; grant it access")))
        }
        _ => Ok(()),
    }
}
