//! Settings of logs and traces.

use postrider_config::{SecretUrl, Secrets};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Logs and traces.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Format of log lines; `auto` is `human` on a terminal and `json` elsewhere.
    pub log_format: LogFormat,
    /// Filter of log lines: `level` or `module=level` directives separated by commas.
    pub log_filter: String,
    pub otlp: Otlp,
}

impl Default for Config {
    fn default() -> Self {
        let log_filter = "info,rdkafka=warn,librdkafka=warn,opentelemetry=warn".to_owned();
        Self { log_format: LogFormat::Auto, log_filter, otlp: Otlp::default() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Auto,
    Human,
    Json,
}

/// Export of traces.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Otlp {
    /// The collector's base address, such as `http://collector:4317`; empty turns traces off.
    pub endpoint: SecretUrl,
    /// Protocol of the collector.
    pub protocol: OtlpProtocol,
    /// Share of new traces that are recorded, 0 to 1. A sampling decision made by the caller is
    /// kept.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub sample_ratio: f64,
    /// Service name of the process in traces.
    pub service_name: String,
    /// Headers sent with every export, such as a token for the collector; each value is text or
    /// `{file: /path}`.
    pub headers: Secrets,
    /// Time limit of one export, in milliseconds.
    #[schemars(range(min = 1, max = 86_400_000))]
    pub timeout_ms: u64,
}

impl Default for Otlp {
    fn default() -> Self {
        Self {
            endpoint: SecretUrl::default(),
            protocol: OtlpProtocol::Grpc,
            sample_ratio: 0.01,
            service_name: "postrider".to_owned(),
            headers: Secrets::default(),
            timeout_ms: 5_000,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OtlpProtocol {
    /// OTLP over gRPC, usually port 4317.
    Grpc,
    /// OTLP over HTTP with protobuf, usually port 4318.
    Http,
}
