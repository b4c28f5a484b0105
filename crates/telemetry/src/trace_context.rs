//! W3C trace context: the span of the caller, and whether the trace is recorded.
//!
//! It is carried as plain numbers. A request that is not sampled thus costs no span, and its ids
//! are still propagated in the answer and in the record's headers.

use std::{
    fmt,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use opentelemetry::{
    Context,
    trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState},
};

/// Length of a `traceparent` value of version 00.
pub const TRACEPARENT_LEN: usize = 55;

/// One hop of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    pub trace_id: u128,
    pub span_id: u64,
    pub sampled: bool,
}

/// Sampling threshold for new traces, on the scale of `u64`; 0 records none.
static SAMPLE_BELOW: AtomicU64 = AtomicU64::new(0);

/// Set if spans are exported.
static RECORDING: AtomicBool = AtomicBool::new(false);

/// Sets the share of new traces that are recorded, 0 to 1. Without this call, nothing is recorded.
pub fn set_sample_ratio(ratio: f64) {
    RECORDING.store(true, Ordering::Relaxed);
    SAMPLE_BELOW.store((ratio.clamp(0.0, 1.0) * u64::MAX as f64) as u64, Ordering::Relaxed);
}

/// Returns whether this process records spans of sampled traces.
pub fn is_recording() -> bool {
    RECORDING.load(Ordering::Relaxed)
}

impl TraceContext {
    /// Starts a new trace, sampled by the configured ratio.
    pub fn root() -> Self {
        let threshold = SAMPLE_BELOW.load(Ordering::Relaxed);
        let sampled = threshold > 0 && fastrand::u64(..) <= threshold;
        Self { trace_id: fastrand::u128(1..), span_id: fastrand::u64(1..), sampled }
    }

    /// Parses a `traceparent` header; `None` if it is invalid.
    pub fn parse(header: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(header).ok()?;
        let valid = text.is_ascii() && text.len() >= TRACEPARENT_LEN && !text.starts_with("ff");
        let exact = text.len() == TRACEPARENT_LEN
            || (!text.starts_with("00") && text.as_bytes().get(TRACEPARENT_LEN) == Some(&b'-'));
        if !valid || !exact || text.bytes().any(|byte| byte.is_ascii_uppercase() || byte == b'+') {
            return None;
        }
        let mut parts = text.split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        if (version.len(), trace.len(), span.len(), flags.len()) != (2, 32, 16, 2) {
            return None;
        }
        u8::from_str_radix(version, 16).ok()?;
        let context = Self {
            trace_id: u128::from_str_radix(trace, 16).ok()?,
            span_id: u64::from_str_radix(span, 16).ok()?,
            sampled: u8::from_str_radix(flags, 16).ok()? & 1 == 1,
        };
        (context.trace_id != 0 && context.span_id != 0).then_some(context)
    }

    /// Returns the same trace with a new span.
    #[must_use]
    pub fn child(self) -> Self {
        Self { span_id: fastrand::u64(1..), ..self }
    }

    /// Returns the `traceparent` value.
    pub fn traceparent(self) -> [u8; TRACEPARENT_LEN] {
        let mut out = *b"00-00000000000000000000000000000000-0000000000000000-00";
        write_hex(&self.trace_id.to_be_bytes(), &mut out[3..35]);
        write_hex(&self.span_id.to_be_bytes(), &mut out[36..52]);
        out[54] = if self.sampled { b'1' } else { b'0' };
        out
    }

    /// Returns this context as the remote parent of a recorded span.
    pub fn to_otel(self) -> Context {
        let flags = if self.sampled { TraceFlags::SAMPLED } else { TraceFlags::default() };
        Context::new().with_remote_span_context(SpanContext::new(
            TraceId::from(self.trace_id),
            SpanId::from(self.span_id),
            flags,
            true,
            TraceState::default(),
        ))
    }

    /// Returns the context of a recorded span, so that outgoing requests and records name it as
    /// their parent.
    pub fn from_otel(context: &Context) -> Option<Self> {
        let span = context.span();
        let span = span.span_context();
        span.is_valid().then(|| Self {
            trace_id: u128::from_be_bytes(span.trace_id().to_bytes()),
            span_id: u64::from_be_bytes(span.span_id().to_bytes()),
            sampled: span.is_sampled(),
        })
    }
}

/// Writes two hex digits for each byte.
fn write_hex(bytes: &[u8], out: &mut [u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for (byte, pair) in bytes.iter().zip(out.as_chunks_mut::<2>().0) {
        *pair = [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]];
    }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::str::from_utf8(&self.traceparent()).map_err(|_| fmt::Error)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_reads_back_as_written() {
        let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let context = TraceContext::parse(text.as_bytes()).unwrap();
        assert!(context.sampled);
        assert_eq!(context.to_string(), text);
        assert_eq!(TraceContext::from_otel(&context.to_otel()), Some(context));
    }

    #[test]
    fn an_invalid_traceparent_is_ignored() {
        for bad in [
            "",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
            "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ] {
            assert_eq!(TraceContext::parse(bad.as_bytes()), None, "{bad}");
        }
        let later = "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more";
        assert!(TraceContext::parse(later.as_bytes()).is_some());
    }
}
