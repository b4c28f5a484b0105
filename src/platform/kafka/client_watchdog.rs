//! Detects a client of the library that gets nowhere while Kafka answers others, so that its owner replaces it.
//!
//! The library can lose its way for good: a broker that has just restarted may answer a metadata request with topics
//! and no brokers, whereupon the library forgets every broker and never connects again (librdkafka #5301). Requests of
//! such a client fail until the process ends, and nothing in the library notices.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use rdkafka::Statistics;

/// How often clients report, in milliseconds.
pub(super) const REPORT_INTERVAL_MS: u64 = 2_500;

/// Time that a client may be without a connection, or without any response to what it has sent, while Kafka answers.
/// Together with [`RECONNECT`] and one report it stays below the ten seconds within which a client has to be replaced.
const PATIENCE: Duration = Duration::from_secs(4);

/// Time for which Kafka must have answered when a client reports that it is stuck: healthy ones reconnect within a
/// second.
const RECONNECT: Duration = Duration::from_secs(2);

/// The longest patience with a client that was replaced again and again, for clusters that answer metadata requests
/// and nothing else.
const MAX_PATIENCE: Duration = Duration::from_secs(64);

/// The connections of a client, as it last reported them. Shared by the library's callbacks and the owner.
#[derive(Debug)]
pub(super) struct Connectivity {
    begun: Instant,
    last: Mutex<Option<Report>>,
}

/// A report of the library.
#[derive(Debug, Clone, Copy)]
struct Report {
    at: Instant,
    connected: bool,
    /// It has sent something, or has something to send, that brokers have not answered.
    waiting: bool,
    responses: u64,
    /// The first report with so many responses.
    responded_at: Instant,
}

impl Default for Connectivity {
    fn default() -> Self {
        Self { begun: Instant::now(), last: Mutex::default() }
    }
}

impl Connectivity {
    /// Takes over a report of the library. Connections to a group coordinator do not count: the library keeps them
    /// when it has forgotten the brokers.
    pub fn report(&self, statistics: &Statistics) {
        let brokers =
            || statistics.brokers.values().filter(|broker| matches!(&*broker.source, "learned" | "configured"));
        let connected = brokers().any(|broker| broker.state == "UP");
        let waiting = brokers().any(|broker| broker.waitresp_cnt > 0 || broker.outbuf_cnt > 0);
        let responses = brokers().map(|broker| broker.rx).sum();
        self.update(Instant::now(), connected, waiting || statistics.msg_cnt > 0, responses);
    }

    fn update(&self, at: Instant, connected: bool, waiting: bool, responses: u64) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        // Brokers that are forgotten take their counts along, so the sum may fall as well.
        let unchanged = last.filter(|last| last.responses == responses);
        let responded_at = unchanged.map_or(at, |last| last.responded_at);
        *last = Some(Report { at, connected, waiting, responses, responded_at });
    }
}

/// The reason for replacing a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stuck {
    Disconnected,
    Unanswered,
    /// A consumer that has lost its place in its group.
    Excluded,
}

impl Stuck {
    /// The value of the metric's label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Disconnected => "disconnected",
            Self::Unanswered => "unanswered",
            Self::Excluded => "excluded",
        }
    }
}

/// Decides when a client is stuck. One per owner; it outlives the clients that the owner replaces.
#[derive(Debug, Default)]
pub(super) struct ClientWatchdog {
    /// Replacements since a client was last seen connected.
    replaced: AtomicU32,
}

impl ClientWatchdog {
    /// Returns the reason when the client gets nowhere, by its last report. `kafka_up_since` is asked for that report:
    /// since when Kafka has answered others, if it has answered since then as well.
    pub fn look(
        &self,
        client: &Connectivity,
        kafka_up_since: impl FnOnce(Instant) -> Option<Instant>,
    ) -> Option<Stuck> {
        let report = (*client.last.lock().unwrap_or_else(PoisonError::into_inner))?;
        let replaced = self.replaced.load(Ordering::Relaxed);
        let patience = (PATIENCE * 2_u32.saturating_pow(replaced.min(8))).min(MAX_PATIENCE);
        let age = report.at.saturating_duration_since(client.begun);
        // Silence is only seen when two reports are equal.
        let silent_for = report.at.saturating_duration_since(report.responded_at);
        let unanswered = report.waiting && silent_for >= patience.max(Duration::from_millis(2 * REPORT_INTERVAL_MS));
        let stuck = match (report.connected, unanswered) {
            (false, _) => Stuck::Disconnected,
            (true, true) => Stuck::Unanswered,
            (true, false) => {
                if replaced > 0 && age > patience {
                    self.replaced.store(0, Ordering::Relaxed);
                }
                return None;
            }
        };
        let kafka_is_fine = || kafka_up_since(report.at).is_some_and(|since| since + RECONNECT <= report.at);
        (age >= patience && kafka_is_fine()).then_some(stuck)
    }

    /// Notes that the owner replaced its client, which makes the watchdog more patient with the next one, and says so
    /// in metrics and log.
    pub fn replaced(&self, client: &str, reason: &'static str) {
        self.replaced.fetch_add(1, Ordering::Relaxed);
        count_replacement(client, reason);
    }
}

/// Counts and logs that a client of this name was replaced.
pub(super) fn count_replacement(client: &str, reason: &'static str) {
    metrics::counter!("postrider_kafka_clients_replaced_total", "client" => client.to_owned(), "reason" => reason)
        .increment(1);
    tracing::warn!(client, reason, "replaced a kafka client that could not go on");
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Kafka has answered for long, and still does.
    fn up(reported: Instant) -> Option<Instant> {
        Some(reported - 100 * SECOND)
    }

    /// A client whose reports say the same for so many seconds.
    fn client(connected: bool, waiting: bool, seconds: u32) -> Connectivity {
        let client = Connectivity::default();
        for second in 0..=seconds {
            client.update(client.begun + second * SECOND, connected, waiting, 7);
        }
        client
    }

    #[test]
    fn a_client_without_connection_is_stuck_only_while_kafka_answers_others() {
        let watchdog = ClientWatchdog::default();
        assert_eq!(watchdog.look(&Connectivity::default(), up), None, "it has not reported yet");
        assert_eq!(watchdog.look(&client(false, false, 3), up), None, "it may still be connecting");
        assert_eq!(watchdog.look(&client(false, false, 4), up), Some(Stuck::Disconnected));
        assert_eq!(watchdog.look(&client(false, false, 400), |_| None), None, "nobody reaches Kafka");
        let just_back = |reported: Instant| Some(reported - SECOND);
        assert_eq!(watchdog.look(&client(false, false, 400), just_back), None, "it needs a moment to reconnect");
    }

    #[test]
    fn a_report_from_before_kafka_was_back_says_nothing_however_long_ago_that_is() {
        let watchdog = ClientWatchdog::default();
        let back_after = |reported: Instant| Some(reported + SECOND);
        assert_eq!(watchdog.look(&client(false, false, 400), back_after), None);
        assert_eq!(watchdog.look(&client(true, true, 400), back_after), None);
    }

    #[test]
    fn a_client_that_waits_for_responses_and_gets_none_is_stuck() {
        let watchdog = ClientWatchdog::default();
        assert_eq!(watchdog.look(&client(true, false, 400), up), None, "it waits for nothing");
        assert_eq!(watchdog.look(&client(true, true, 4), up), None);
        assert_eq!(watchdog.look(&client(true, true, 6), up), Some(Stuck::Unanswered));
        let served = client(true, true, 60);
        served.update(served.begun + 61 * SECOND, true, true, 8);
        assert_eq!(watchdog.look(&served, up), None, "a response has just arrived");
    }

    #[test]
    fn replacing_in_vain_becomes_rarer_until_a_client_connects() {
        let watchdog = ClientWatchdog::default();
        watchdog.replaced("test", "disconnected");
        watchdog.replaced("test", "disconnected");
        assert_eq!(watchdog.look(&client(false, false, 15), up), None);
        assert_eq!(watchdog.look(&client(false, false, 16), up), Some(Stuck::Disconnected));
        (0..20).for_each(|_| watchdog.replaced("test", "disconnected"));
        assert_eq!(watchdog.look(&client(false, false, 64), up), Some(Stuck::Disconnected));
        assert_eq!(watchdog.look(&client(true, false, 65), up), None);
        assert_eq!(watchdog.look(&client(false, false, 4), up), Some(Stuck::Disconnected));
    }
}
