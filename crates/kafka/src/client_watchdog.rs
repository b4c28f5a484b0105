//! Detects a client of the library that is stuck while Kafka answers other clients, so that its
//! owner replaces it.
//!
//! The library can get stuck for good: a broker that has just restarted may answer a metadata
//! request with topics and no brokers, whereupon the library forgets every broker and never
//! connects again (librdkafka #5301). Requests of such a client fail until the process ends, and
//! the library does not detect it.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use postrider_time::backoff::Backoff;
use rdkafka::Statistics;

/// Interval of the clients' reports, in milliseconds.
pub(super) const REPORT_INTERVAL_MS: u64 = 1_000;

/// Time that a client may be without a connection, or wait for a response to its requests, while
/// Kafka answers. Together with [`RECONNECT`] and one report it stays below ten seconds, the time
/// within which a stuck client has to be replaced.
const PATIENCE: Duration = Duration::from_secs(5);

/// Time that Kafka must have been answering before a client's report that it is stuck counts:
/// healthy clients reconnect within a second.
const RECONNECT: Duration = Duration::from_secs(2);

/// Patience after repeated replacements, for clusters that answer metadata requests and nothing
/// else.
const BACKOFF: Backoff = Backoff::doubling(PATIENCE, Duration::from_secs(64));

/// State of a client's connections in its last report. Shared by the library's callbacks and the
/// client's owner.
#[derive(Debug)]
pub(super) struct Connectivity {
    begun: Instant,
    last: Mutex<Option<Report>>,
}

/// One report of the library.
#[derive(Debug, Clone, Copy)]
struct Report {
    at: Instant,
    connected: bool,
    responses: u64,
    /// Time since which no broker has answered while a request waited; `None` if no request waits.
    waiting_since: Option<Instant>,
}

impl Default for Connectivity {
    fn default() -> Self {
        Self { begun: Instant::now(), last: Mutex::default() }
    }
}

impl Connectivity {
    /// Updates the state from a report of the library. Connections to a group coordinator do not
    /// count: the library keeps them even after it has forgotten the brokers.
    pub fn report(&self, statistics: &Statistics) {
        let brokers =
            || statistics.brokers.values().filter(|broker| matches!(&*broker.source, "learned" | "configured"));
        let connected = brokers().any(|broker| broker.state == "UP");
        let responses = brokers().map(|broker| broker.rx).sum();
        // Brokers answer in order, so while anything is unanswered, the last request is too.
        let unanswered = brokers().filter(|broker| broker.waitresp_cnt > 0);
        let sent_ago = unanswered.map(|broker| u64::try_from(broker.txidle).unwrap_or(0)).max();
        let is_queued = || statistics.msg_cnt > 0 || brokers().any(|broker| broker.outbuf_cnt > 0);
        let waiting_for = sent_ago.or_else(|| is_queued().then_some(0)).map(Duration::from_micros);
        self.update(Instant::now(), connected, waiting_for, responses);
    }

    /// `waiting_for` is the time since the last request, if it is unanswered.
    fn update(&self, at: Instant, connected: bool, waiting_for: Option<Duration>, responses: u64) {
        let mut last = self.last.lock();
        let waiting_since = waiting_for.map(|waiting_for| {
            let sent = at.checked_sub(waiting_for).unwrap_or(at);
            match *last {
                // The library drops the counts of forgotten brokers, so the sum may also decrease.
                Some(last) if last.responses != responses => sent.max(last.at),
                Some(Report { waiting_since: Some(since), .. }) => since,
                _ => sent,
            }
        });
        *last = Some(Report { at, connected, responses, waiting_since });
    }
}

/// Reason for replacing a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stuck {
    Disconnected,
    Unanswered,
    /// The consumer is excluded from its group.
    Excluded,
}

impl Stuck {
    /// Returns the value of the metric's label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Disconnected => "disconnected",
            Self::Unanswered => "unanswered",
            Self::Excluded => "excluded",
        }
    }
}

/// Decides when a client is stuck. There is one per owner, and it outlives the clients that the
/// owner replaces.
#[derive(Debug, Default)]
pub(super) struct ClientWatchdog {
    /// Number of replacements since a client was last connected.
    replaced: AtomicU32,
}

impl ClientWatchdog {
    /// Returns the reason if the client was stuck in its last report. `kafka_up_since` is called
    /// with the time of that report. It returns the time since which Kafka has answered other
    /// clients, if Kafka has also answered after the report.
    pub fn look(
        &self,
        client: &Connectivity,
        kafka_up_since: impl FnOnce(Instant) -> Option<Instant>,
    ) -> Option<Stuck> {
        let report = (*client.last.lock())?;
        let replaced = self.replaced.load(Ordering::Relaxed);
        let patience = BACKOFF.delay(replaced.saturating_add(1), 0.0);
        let age = report.at.saturating_duration_since(client.begun);
        let unanswered = report.waiting_since.is_some_and(|since| report.at.duration_since(since) >= patience);
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

    /// Records that the owner replaced its client, in metrics and log. The watchdog then waits
    /// longer before it reports the next client as stuck.
    pub fn replaced(&self, client: &str, reason: &'static str) {
        self.replaced.fetch_add(1, Ordering::Relaxed);
        count_replacement(client, reason);
    }
}

/// Counts and logs the replacement of the client `client`.
pub(super) fn count_replacement(client: &str, reason: &'static str) {
    metrics::counter!("postrider_kafka_clients_replaced_total", "client" => client.to_owned(), "reason" => reason)
        .increment(1);
    tracing::warn!(client, reason, "replaced a kafka client that was stuck or had failed");
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Kafka has been answering for a long time, and still does.
    fn up(reported: Instant) -> Option<Instant> {
        Some(reported - 100 * SECOND)
    }

    /// Returns a client that reported the same for so many seconds.
    fn client(connected: bool, waiting: bool, seconds: u32) -> Connectivity {
        let client = Connectivity::default();
        for second in 0..=seconds {
            client.update(client.begun + second * SECOND, connected, waiting.then_some(Duration::ZERO), 7);
        }
        client
    }

    #[test]
    fn a_client_without_connection_is_stuck_only_while_kafka_answers_others() {
        let watchdog = ClientWatchdog::default();
        assert_eq!(watchdog.look(&Connectivity::default(), up), None, "it has not reported yet");
        assert_eq!(watchdog.look(&client(false, false, 4), up), None, "it may still be connecting");
        assert_eq!(watchdog.look(&client(false, false, 5), up), Some(Stuck::Disconnected));
        assert_eq!(watchdog.look(&client(false, false, 400), |_| None), None, "Kafka answers no client");
        let just_back = |reported: Instant| Some(reported - SECOND);
        assert_eq!(watchdog.look(&client(false, false, 400), just_back), None, "it needs a moment to reconnect");
    }

    #[test]
    fn a_report_from_before_kafka_was_back_does_not_count() {
        let watchdog = ClientWatchdog::default();
        let back_after = |reported: Instant| Some(reported + SECOND);
        assert_eq!(watchdog.look(&client(false, false, 400), back_after), None);
        assert_eq!(watchdog.look(&client(true, true, 400), back_after), None);
    }

    #[test]
    fn a_client_that_waits_for_responses_and_gets_none_is_stuck() {
        let watchdog = ClientWatchdog::default();
        assert_eq!(watchdog.look(&client(true, false, 400), up), None, "it has no unanswered requests");
        assert_eq!(watchdog.look(&client(true, true, 4), up), None);
        assert_eq!(watchdog.look(&client(true, true, 5), up), Some(Stuck::Unanswered));
        let served = client(true, true, 60);
        // One of several brokers is silent, while the others answer.
        for second in 61..=90 {
            served.update(served.begun + second * SECOND, true, Some((second - 60) * SECOND), u64::from(second));
            assert_eq!(watchdog.look(&served, up), None, "a response has just arrived");
        }
    }

    #[test]
    fn the_time_that_a_client_was_idle_does_not_count_as_waiting() {
        let watchdog = ClientWatchdog::default();
        let idle = client(true, false, 60);
        // The request was sent half a second before the first report that shows it.
        for second in 61..=65 {
            let ago = (second - 61) * SECOND + SECOND / 2;
            idle.update(idle.begun + second * SECOND, true, Some(ago), 7);
            assert_eq!(watchdog.look(&idle, up), None, "after {second} s");
        }
        idle.update(idle.begun + 66 * SECOND, true, Some(5 * SECOND + SECOND / 2), 7);
        assert_eq!(watchdog.look(&idle, up), Some(Stuck::Unanswered));
    }

    #[test]
    fn further_requests_do_not_make_a_client_wait_less_long() {
        let watchdog = ClientWatchdog::default();
        let idle = client(true, false, 60);
        (61..=66).for_each(|second| idle.update(idle.begun + second * SECOND, true, Some(SECOND / 10), 7));
        assert_eq!(watchdog.look(&idle, up), Some(Stuck::Unanswered));
    }

    #[test]
    fn futile_replacements_become_rarer_until_a_client_connects() {
        let watchdog = ClientWatchdog::default();
        watchdog.replaced("test", "disconnected");
        watchdog.replaced("test", "disconnected");
        assert_eq!(watchdog.look(&client(false, false, 19), up), None);
        assert_eq!(watchdog.look(&client(false, false, 20), up), Some(Stuck::Disconnected));
        (0..20).for_each(|_| watchdog.replaced("test", "disconnected"));
        assert_eq!(watchdog.look(&client(false, false, 64), up), Some(Stuck::Disconnected));
        assert_eq!(watchdog.look(&client(true, false, 65), up), None);
        assert_eq!(watchdog.look(&client(false, false, 5), up), Some(Stuck::Disconnected));
    }
}
