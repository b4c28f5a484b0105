//! The error of a process.

use std::io;

use postrider_http::{client_address::NoNetwork, origin::NotAnOrigin, tls::TlsError};
use postrider_openapi as openapi;
use postrider_outbound::OptionsError;
use postrider_postgres as postgres;
use postrider_process::{drain::TaskFailure, replace};
use postrider_telemetry as telemetry;
use rdkafka::error::KafkaError;

use super::{access, relay, rotation::LoadError};

/// Reason why a process did not start, or ended with a failure. The text is a sentence for the
/// operator.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot listen for signals: {0}")]
    Signals(#[source] io::Error),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("cannot start the async runtime: {0}")]
    Runtime(#[source] io::Error),
    #[error(transparent)]
    Telemetry(#[from] telemetry::Error),
    /// An address of this setting cannot be used, because it is taken, for example.
    #[error("{source} (`{setting}`)")]
    Bind { setting: &'static str, source: io::Error },
    /// The address of a bound listener is not known.
    #[error(transparent)]
    Listener(io::Error),
    #[error("kafka: {0}")]
    Kafka(#[from] KafkaError),
    #[error(transparent)]
    Postgres(#[from] postgres::Error),
    #[error(transparent)]
    TrustedProxies(#[from] NoNetwork),
    #[error("`http.cors.origins`: {0}")]
    Origins(#[from] NotAnOrigin),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    OpenApi(#[from] openapi::Error),
    /// The settings cannot be written as JSON.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    /// The client for the issuer's keys cannot be made.
    #[error(transparent)]
    Issuer(#[from] OptionsError),
    #[error(transparent)]
    Undeclared(#[from] access::Undeclared),
    #[error(transparent)]
    Relay(#[from] relay::CheckError),
    #[error(transparent)]
    Tasks(#[from] TaskFailure),
    #[error(transparent)]
    Replace(#[from] replace::Error),
}
