//! Tries settings before they are put to use.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use rdkafka::{
    ClientContext,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, Consumer, ConsumerContext},
    error::{KafkaError, RDKafkaErrorCode},
};

use super::{
    Config,
    broker::{METADATA_GROUP, ask, without_thread},
};
use crate::platform::trial::Fault;

/// Time until a broker answers.
const PATIENCE: Duration = Duration::from_secs(10);
/// Time after which a rejection counts. The first ones may come from a broker that has not heard of the change yet.
const REJECTION_PATIENCE: Duration = Duration::from_secs(2);
/// Time for one question. Between two, the client is asked why there is no answer.
const QUESTION: Duration = Duration::from_millis(500);

/// Keeps why brokers rejected this client, as long as none of them has taken it.
#[derive(Default)]
struct Rejections(Mutex<Option<String>>);

impl Rejections {
    fn last(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl ClientContext for Rejections {
    fn log(&self, _: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(facility, message, "the client that tries a rotated secret reports a problem");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        use RDKafkaErrorCode as E;
        tracing::debug!(error = %error, reason, "the client that tries a rotated secret reports a problem");
        if matches!(
            error.rdkafka_error_code(),
            Some(E::Authentication | E::SaslAuthenticationFailed | E::SSL | E::UnsupportedSASLMechanism)
        ) {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(without_thread(reason).to_owned());
        }
    }
}

impl ConsumerContext for Rejections {}

type Client = BaseConsumer<Rejections>;

/// Connects with a client of its own until a broker answers, and looks whether these topics may be seen.
pub async fn try_out(config: &Config, topics: Vec<String>) -> Result<(), Fault> {
    let config = config.clone();
    let tried = tokio::task::spawn_blocking(move || {
        let client = config.observer("rotation", METADATA_GROUP, Rejections::default());
        let client = client.map_err(|error| Fault::Refused(error.to_string()))?;
        let outcome = await_answer(&client, &config.topic("messages"))
            .and_then(|()| topics.iter().try_for_each(|topic| look(&client, topic)));
        super::discard(client);
        outcome
    });
    tried.await.unwrap_or_else(|error| Err(Fault::Unreachable(error.to_string())))
}

fn await_answer(client: &Client, topic: &str) -> Result<(), Fault> {
    let begun = Instant::now();
    loop {
        if ask(client, topic, QUESTION).is_ok() {
            return Ok(());
        }
        // Polling only makes the client say what it has to say.
        for _ in 0..20 {
            drop(client.poll(Duration::ZERO));
        }
        if let Some(reason) = client.context().last().filter(|_| begun.elapsed() > REJECTION_PATIENCE) {
            return Err(Fault::Refused(reason));
        }
        if begun.elapsed() > PATIENCE {
            return Err(Fault::Unreachable(format!("no broker answers within {} s", PATIENCE.as_secs())));
        }
    }
}

/// A topic that does not exist, or whose leader is away, is no fault of the settings.
fn look(client: &Client, topic: &str) -> Result<(), Fault> {
    let metadata = client.fetch_metadata(Some(topic), PATIENCE);
    let metadata = metadata.map_err(|error| Fault::Unreachable(error.to_string()))?;
    let found = metadata.topics().iter().find(|found| found.name() == topic);
    match found.and_then(|found| found.error()).map(RDKafkaErrorCode::from) {
        Some(RDKafkaErrorCode::TopicAuthorizationFailed) => {
            Err(Fault::Refused(format!("this account may not use the topic `{topic}`")))
        }
        _ => Ok(()),
    }
}
