//! Creates a span for every sampled record, in the trace of the request that wrote it.

use postrider_telemetry::trace_context::{self, TraceContext};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::{
    batch::{Batch, Record},
    event,
};

/// Maximum number of recorded spans per batch.
const MAX_SPANS: usize = 32;

pub(super) fn of_batch(batch: &Batch, name: &'static str) -> Vec<tracing::Span> {
    if !trace_context::is_recording() {
        return Vec::new();
    }
    batch.iter().filter_map(|record| of_record(&record, name)).take(MAX_SPANS).collect()
}

pub(super) fn of_record(record: &Record<'_>, name: &'static str) -> Option<tracing::Span> {
    if !trace_context::is_recording() {
        return None;
    }
    let parent = TraceContext::parse(record.header(event::TRACEPARENT)?).filter(|context| context.sampled)?;
    let span = tracing::info_span!(
        "process",
        otel.name = format!("process {name}"),
        otel.kind = "consumer",
        messaging.system = "kafka",
        messaging.kafka.offset = record.offset(),
    );
    // Fails only if nothing records spans.
    let _ = span.set_parent(parent.to_otel());
    Some(span)
}
