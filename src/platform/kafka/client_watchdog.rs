//! Detects a client of the library that gets nowhere while Kafka answers others, so that its owner replaces it.
//!
//! The library can lose its way for good: a broker that has just restarted may answer a metadata request with topics
//! and no brokers, whereupon the library forgets every broker and never connects again (librdkafka #5301). Requests of
//! such a client fail until the process ends, and nothing in the library notices.

use std::{
    sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use rdkafka::Statistics;

/// How often clients report, in milliseconds.
pub(super) const REPORT_INTERVAL_MS: u64 = 2_500;

/// How long a client may be without a connection, or without any response to what it has sent, while Kafka answers.
/// Together with one report it stays below the ten seconds within which a client has to be replaced.
const PATIENCE: Duration = Duration::from_secs(4);

/// How long Kafka must have answered before a client is taken for stuck that has no connection: healthy ones reconnect
/// within a second.
const RECONNECT: Duration = Duration::from_secs(2);

/// The longest patience with a client that was replaced again and again, for clusters that answer metadata requests
/// and nothing else.
const MAX_PATIENCE: Duration = Duration::from_secs(64);

/// What a client last reported about its connections. Shared by the library's callbacks and the owner.
#[derive(Debug)]
pub(super) struct Connectivity {
    begun: Instant,
    connected: AtomicBool,
    waiting: AtomicBool,
    responses: AtomicU64,
    /// When a response was last seen, in milliseconds since `begun`; -1 before the first report.
    responded_ms: AtomicI64,
}

impl Default for Connectivity {
    fn default() -> Self {
        Self {
            begun: Instant::now(),
            // A client has until its first report to connect.
            connected: AtomicBool::new(true),
            waiting: AtomicBool::new(false),
            responses: AtomicU64::new(0),
            responded_ms: AtomicI64::new(-1),
        }
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
        self.update(connected, waiting || statistics.msg_cnt > 0, responses);
    }

    fn update(&self, connected: bool, waiting: bool, responses: u64) {
        self.connected.store(connected, Ordering::Relaxed);
        self.waiting.store(waiting, Ordering::Relaxed);
        // Brokers that are forgotten take their counts along, so the sum may fall as well.
        if self.responses.swap(responses, Ordering::Relaxed) != responses
            || self.responded_ms.load(Ordering::Relaxed) < 0
        {
            self.responded_ms.store(self.begun.elapsed().as_millis() as i64, Ordering::Relaxed);
        }
    }

    fn responded_at(&self) -> Option<Instant> {
        let ms = u64::try_from(self.responded_ms.load(Ordering::Relaxed)).ok()?;
        Some(self.begun + Duration::from_millis(ms))
    }
}

/// Why a client is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stuck {
    Disconnected,
    Unanswered,
}

impl Stuck {
    /// The value of the metric's label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Disconnected => "disconnected",
            Self::Unanswered => "unanswered",
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
    /// Whether the client gets nowhere. `kafka_up_for` is how long the metadata client has had its answers without
    /// interruption; `None` while it has none.
    pub fn look(&self, client: &Connectivity, kafka_up_for: Option<Duration>, now: Instant) -> Option<Stuck> {
        let patience =
            (PATIENCE * 2_u32.saturating_pow(self.replaced.load(Ordering::Relaxed).min(8))).min(MAX_PATIENCE);
        let kafka_is_fine = kafka_up_for.is_some_and(|up_for| up_for >= RECONNECT);
        let age = now.saturating_duration_since(client.begun);
        let connected = client.connected.load(Ordering::Relaxed);
        let silent_for = client.responded_at().map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        // Silence is only seen when two reports are equal.
        let unanswered = client.waiting.load(Ordering::Relaxed)
            && silent_for >= patience.max(Duration::from_millis(2 * REPORT_INTERVAL_MS));
        let stuck = match (connected, unanswered) {
            (false, _) => Stuck::Disconnected,
            (true, true) => Stuck::Unanswered,
            (true, false) => {
                if age > patience {
                    self.replaced.store(0, Ordering::Relaxed);
                }
                return None;
            }
        };
        (kafka_is_fine && age >= patience).then_some(stuck)
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
    tracing::warn!(client, reason, "kafka client made no progress while Kafka answered, replaced it");
}

#[cfg(test)]
mod tests {
    use super::*;

    const UP: Option<Duration> = Some(Duration::from_secs(100));

    fn client(connected: bool, waiting: bool) -> Connectivity {
        let client = Connectivity::default();
        client.update(connected, waiting, 7);
        client
    }

    fn after(client: &Connectivity, seconds: u64) -> Instant {
        client.begun + Duration::from_secs(seconds)
    }

    #[test]
    fn a_client_without_connection_is_stuck_only_while_kafka_answers_others() {
        let (watchdog, client) = (ClientWatchdog::default(), client(false, false));
        assert_eq!(watchdog.look(&client, UP, after(&client, 3)), None, "it may still be connecting");
        assert_eq!(watchdog.look(&client, UP, after(&client, 4)), Some(Stuck::Disconnected));
        assert_eq!(watchdog.look(&client, None, after(&client, 400)), None, "nobody reaches Kafka");
        let just_back = Some(Duration::from_secs(1));
        assert_eq!(watchdog.look(&client, just_back, after(&client, 400)), None, "it needs a moment to reconnect");
    }

    #[test]
    fn a_client_that_waits_for_responses_and_gets_none_is_stuck() {
        let watchdog = ClientWatchdog::default();
        let idle = client(true, false);
        assert_eq!(watchdog.look(&idle, UP, after(&idle, 400)), None, "it waits for nothing");
        let silent = client(true, true);
        assert_eq!(watchdog.look(&silent, UP, after(&silent, 4)), None);
        assert_eq!(watchdog.look(&silent, UP, after(&silent, 6)), Some(Stuck::Unanswered));
        let served = Connectivity { begun: Instant::now() - Duration::from_secs(60), ..client(true, true) };
        served.update(true, true, 8);
        assert_eq!(watchdog.look(&served, UP, Instant::now()), None, "a response has just arrived");
    }

    #[test]
    fn replacing_in_vain_becomes_rarer_until_a_client_connects() {
        let (watchdog, stuck) = (ClientWatchdog::default(), client(false, false));
        watchdog.replaced("test", "disconnected");
        watchdog.replaced("test", "disconnected");
        assert_eq!(watchdog.look(&stuck, UP, after(&stuck, 15)), None);
        assert_eq!(watchdog.look(&stuck, UP, after(&stuck, 16)), Some(Stuck::Disconnected));
        (0..20).for_each(|_| watchdog.replaced("test", "disconnected"));
        assert_eq!(watchdog.look(&stuck, UP, after(&stuck, 64)), Some(Stuck::Disconnected));
        let fine = client(true, false);
        assert_eq!(watchdog.look(&fine, UP, after(&fine, 65)), None);
        assert_eq!(watchdog.look(&stuck, UP, after(&stuck, 4)), Some(Stuck::Disconnected));
    }
}
