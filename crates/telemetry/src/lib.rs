//! Logs, traces and metrics of the process.

mod config;
mod export;
mod metrics;
mod status_line;
pub mod trace_context;
pub mod unknown;

pub use config::{Config, LogFormat, Otlp, OtlpProtocol};
pub use metrics::{install as install_metrics, note_start, upkeep};
pub use status_line::StatusLine;

use std::{io::IsTerminal, time::Duration};

use axum::http::{self, HeaderMap};
use metrics_exporter_prometheus::BuildError;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{
    ExporterBuildError, SpanExporter, WithExportConfig, WithHttpConfig, WithTonicConfig,
    tonic_types::metadata::MetadataMap,
};
use opentelemetry_sdk::{
    Resource,
    trace::{Sampler, SdkTracerProvider},
};
use postrider_config::Secrets;
use postrider_outbound::OptionsError;
use tracing::Subscriber;
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{FilterExt, ParseError, dynamic_filter_fn},
    layer::{Context, Filter, SubscriberExt},
    util::{SubscriberInitExt, TryInitError},
};

use self::{export::Exporter, status_line::AboveStatus};

/// Error of the set-up of logs, traces and metrics.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("telemetry.log_filter: {0}")]
    LogFilter(#[from] ParseError),
    #[error("telemetry.otlp.headers: {0}")]
    OtlpHeaders(#[from] http::Error),
    /// The endpoint or another setting is invalid. Secret parts of the endpoint are masked.
    #[error("telemetry.otlp: {problem}")]
    OtlpExporter { problem: String },
    #[error("telemetry.otlp: {0}")]
    OtlpClient(#[from] OptionsError),
    /// The process already has a subscriber or a logger.
    #[error(transparent)]
    Subscriber(#[from] TryInitError),
    /// The process already has a recorder, or the recorder's settings are invalid.
    #[error(transparent)]
    Recorder(#[from] BuildError),
}

/// Owner of the trace exporter; shut it down last.
pub struct Telemetry {
    tracer: Option<SdkTracerProvider>,
}

/// Sets up logs and, if an endpoint is configured, traces. Call it inside the runtime.
pub fn init(config: &Config, role: &str) -> Result<Telemetry, Error> {
    let filter = evaluated_every_time(filter(config)?);
    let human = match config.log_format {
        LogFormat::Human => true,
        LogFormat::Json => false,
        LogFormat::Auto => std::io::stderr().is_terminal(),
    };
    let log = tracing_subscriber::fmt::layer().with_writer(|| AboveStatus);
    let log = match human {
        true => log.with_target(false).with_filter(filter).boxed(),
        false => {
            log.json().flatten_event(true).with_current_span(false).with_span_list(false).with_filter(filter).boxed()
        }
    };
    let tracer = match config.otlp.endpoint.is_empty() {
        true => None,
        false => Some(tracer(&config.otlp, role)?),
    };
    if tracer.is_some() {
        trace_context::set_sample_ratio(config.otlp.sample_ratio);
    }
    // The sampling decision is made before a span exists, so every span that exists is recorded.
    let traces = tracer.as_ref().map(|provider| {
        tracing_opentelemetry::layer().with_tracer(provider.tracer("postrider")).with_filter(
            tracing_subscriber::filter::filter_fn(|metadata| {
                metadata.is_span() && metadata.target().starts_with("postrider")
            }),
        )
    });
    tracing_subscriber::registry().with(log).with(traces).try_init()?;
    Ok(Telemetry { tracer })
}

/// Returns an error if the configuration is invalid. Call it inside the runtime, where blocking is
/// allowed.
pub fn check(config: &Config) -> Result<(), Error> {
    filter(config)?;
    if config.otlp.endpoint.is_empty() { Ok(()) } else { exporter(&config.otlp).map(drop) }
}

fn filter(config: &Config) -> Result<EnvFilter, ParseError> {
    EnvFilter::try_new(&config.log_filter)
}

/// Evaluates the filter for every line, so that the subscriber does not cache that a line is always
/// enabled. Kafka's client asks whether a level is enabled and then logs nothing. The result stays
/// on that thread, and would be applied to the next line there if that line were not checked again:
/// the line would be dropped.
fn evaluated_every_time<S: Subscriber>(filter: EnvFilter) -> impl Filter<S> {
    let mut always = dynamic_filter_fn(|_, _: &Context<'_, S>| true);
    if let Some(level) = filter.max_level_hint() {
        always = always.with_max_level_hint(level);
    }
    filter.and(always)
}

fn exporter(otlp: &Otlp) -> Result<SpanExporter, Error> {
    let masked = |error: ExporterBuildError| Error::OtlpExporter { problem: otlp.endpoint.mask_in(&error.to_string()) };
    let timeout = Duration::from_millis(otlp.timeout_ms);
    let headers = otlp.headers.iter().map(|(name, value)| (name.clone(), value.expose().to_owned()));
    match otlp.protocol {
        OtlpProtocol::Grpc => {
            let metadata = metadata(&otlp.headers)?;
            let builder =
                SpanExporter::builder().with_tonic().with_endpoint(otlp.endpoint.expose()).with_timeout(timeout);
            builder.with_metadata(metadata).build().map_err(masked)
        }
        OtlpProtocol::Http => {
            let endpoint = format!("{}/v1/traces", otlp.endpoint.expose().trim_end_matches('/'));
            let builder = SpanExporter::builder().with_http().with_endpoint(endpoint).with_timeout(timeout);
            let builder = builder.with_http_client(Exporter::new(timeout)?);
            builder.with_headers(headers.collect()).build().map_err(masked)
        }
    }
}

fn tracer(otlp: &Otlp, role: &str) -> Result<SdkTracerProvider, Error> {
    let exporter = exporter(otlp)?;
    let resource = Resource::builder()
        .with_service_name(otlp.service_name.clone())
        .with_attribute(opentelemetry::KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_attribute(opentelemetry::KeyValue::new("postrider.role", role.to_owned()))
        .build();
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::AlwaysOn)))
        .with_resource(resource)
        .build())
}

fn metadata(headers: &Secrets) -> Result<MetadataMap, http::Error> {
    let headers = HeaderMap::try_from(
        &headers
            .iter()
            .map(|(name, value)| (name.clone(), value.expose().to_owned()))
            .collect::<std::collections::HashMap<_, _>>(),
    )?;
    Ok(MetadataMap::from_headers(headers))
}

impl Telemetry {
    /// Sends the remaining traces. Call it outside the runtime.
    pub fn shutdown(self, deadline: Duration) {
        if let Some(tracer) = self.tracer
            && let Err(error) = tracer.shutdown_with_timeout(deadline)
        {
            tracing::warn!(error = %error, "traces lost at shutdown");
        }
    }
}
