//! Log lines of the client library, folded into postrider's own.
//!
//! During an outage every client logs each failed connection, and postrider logs the outage itself.
//! So the first line is logged, further ones are counted, and the next line that is logged, or the
//! end of the outage, has their number. At the level `debug` every line is logged.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rdkafka::{ClientContext, config::RDKafkaLogLevel, consumer::ConsumerContext, error::KafkaError};

use super::broker::without_thread;

/// Time within which only one line is logged.
const FOLD: Duration = Duration::from_secs(60);

static FOLDED: Mutex<Folding> = Mutex::new(Folding { logged_at: None, folded: 0 });

/// Lines that were counted instead of logged.
struct Folding {
    logged_at: Option<Instant>,
    folded: u64,
}

impl Folding {
    /// Counts a line. Returns the number of lines since the last one that was logged, if this one
    /// is to be logged.
    fn add(&mut self, now: Instant) -> Option<u64> {
        if self.logged_at.is_some_and(|logged_at| now.duration_since(logged_at) < FOLD) {
            self.folded += 1;
            return None;
        }
        self.logged_at = Some(now);
        Some(std::mem::take(&mut self.folded))
    }
}

/// Logs or counts a line of a client.
pub(super) fn log(client: &str, level: RDKafkaLogLevel, facility: &str, message: &str) {
    let reason = without_thread(message);
    tracing::debug!(client, facility, reason, "kafka client library");
    if (level as i32) > RDKafkaLogLevel::Warning as i32 {
        return;
    }
    if (level as i32) <= RDKafkaLogLevel::Critical as i32 {
        tracing::error!(client, facility, reason, "kafka client failed");
        return;
    }
    let folded = FOLDED.lock().add(Instant::now());
    if let Some(before) = folded {
        tracing::warn!(
            client,
            reason,
            lines_before = before,
            "kafka client reported an error, more within a minute are counted"
        );
    }
}

/// Returns the number of lines that were counted since the last one that was logged, and starts to
/// count anew.
pub(super) fn take() -> u64 {
    std::mem::take(&mut FOLDED.lock().folded)
}

/// Context of a client that needs no other callbacks.
pub(super) struct Plain(pub &'static str);

impl ClientContext for Plain {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log(self.0, level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(client = self.0, error = %error, reason, "kafka client reported an error");
    }
}

impl ConsumerContext for Plain {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_minute_is_logged_with_the_number_of_those_before() {
        let (mut folding, start) = (Folding { logged_at: None, folded: 0 }, Instant::now());
        assert_eq!(folding.add(start), Some(0), "the first line has the reason of the outage");
        for second in 1..60 {
            assert_eq!(folding.add(start + Duration::from_secs(second)), None);
        }
        assert_eq!(folding.add(start + FOLD), Some(59));
        assert_eq!(folding.add(start + FOLD), None);
    }
}
