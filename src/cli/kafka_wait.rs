//! Argument of the commands that need Kafka.

use std::time::Duration;

use clap::Args;
use postrider_config::Loaded;
use postrider_kafka::reach::{self, Unreachable};

use super::duration::Span;
use crate::roles::Settings;

/// Default of `--wait`.
const WAIT: Duration = Duration::from_secs(3);

#[derive(Args)]
#[command(next_help_heading = "Kafka")]
pub struct KafkaWait {
    /// Time that Kafka has to answer before the command fails
    #[arg(long = "wait", value_name = "DURATION", default_value = "3s")]
    wait: Span,
}

impl Default for KafkaWait {
    fn default() -> Self {
        Self::new(WAIT)
    }
}

impl KafkaWait {
    pub fn new(wait: Duration) -> Self {
        Self { wait: Span(wait) }
    }

    /// Fails unless Kafka answers in time. The error names the brokers and where they were set.
    pub async fn check(&self, loaded: &Loaded<Settings>) -> Result<(), Unreachable> {
        reach::check(&loaded.settings.kafka, &origin(loaded), self.wait.0).await
    }
}

/// Returns the source of the setting `kafka.brokers`.
pub fn origin(loaded: &Loaded<Settings>) -> String {
    loaded.sources.get("kafka.brokers").map_or_else(|| "the defaults".to_owned(), Clone::clone)
}
