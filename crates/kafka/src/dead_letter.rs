//! Dead letters: records whose processing was abandoned, stored unchanged together with the reason.
//!
//! The value of a dead letter is its record's value. Its headers are the record's own headers in
//! order, then [`header::MARK`], then postrider's headers. Own headers of the same name are
//! therefore kept, and a reader that takes the last header of a name, as Kafka's clients do, gets
//! postrider's. The key is the record's position and the group that dead-lettered it, for example
//! `messages/3@1234 postrider-kv`: if the same group dead-letters a record again, the new dead
//! letter replaces the old one, while those of two groups exist side by side.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use metrics::counter;
use parking_lot::Mutex;
use postrider_telemetry::trace_context::TraceContext;
use postrider_time::clock;
use rdkafka::message::{Header, OwnedHeaders};

use super::{Config, Outgoing, Producer, SendError, TopicSpec, batch::Record, event};

/// Headers that a dead letter adds to those of its record. Texts are UTF-8, numbers are decimal,
/// and times are RFC 3339 in UTC; a header with unknown content is left out.
pub mod header {
    /// Separates the record's own headers from postrider's; the value is the version of this
    /// format.
    pub const MARK: &str = "dead-letter";
    pub const TOPIC: &str = "original-topic";
    pub const PARTITION: &str = "original-partition";
    pub const OFFSET: &str = "original-offset";
    /// The unchanged bytes of the key; absent for a record without a key.
    pub const KEY: &str = "original-key";
    pub const TIMESTAMP: &str = "original-timestamp";
    /// Replaces the null value of a tombstone, which would delete its dead letter.
    pub const TOMBSTONE: &str = "original-tombstone";
    pub const GROUP: &str = "consumer-group";
    pub const ERROR: &str = "error";
    pub const ERROR_CLASS: &str = "error-class";
    pub const ATTEMPTS: &str = "attempts";
    pub const FIRST_FAILED: &str = "first-failed-at";
    pub const FAILED: &str = "failed-at";
    pub const TRACE_ID: &str = "trace-id";
    /// Size in bytes of a value that was too large to be stored; the value remains only in the
    /// original topic.
    pub const VALUE_OMITTED: &str = "value-omitted";
    /// Set if the key and the record's own headers were too large to be stored as well.
    pub const HEADERS_OMITTED: &str = "headers-omitted";
}

/// Maximum number of bytes that a dead letter adds to its record: its key, postrider's headers, and
/// framing.
pub const ROOM_BYTES: u32 = 16 << 10;
/// Maximum length of a stored error message, in bytes.
const MAX_MESSAGE_BYTES: usize = 4 << 10;

/// Reason for dead-lettering a record.
#[derive(Debug, Clone)]
pub struct Reason {
    /// Stable word for filters and metrics.
    pub class: &'static str,
    /// Human-readable sentence.
    pub message: String,
}

/// A record to be dead-lettered, with its failure history.
pub struct Letter<'a> {
    /// Position of the record: the full topic name and the partition.
    pub topic: &'a str,
    pub partition: i32,
    pub record: Record<'a>,
    /// Full name of the consumer group that dead-letters the record.
    pub group: &'a str,
    pub reason: &'a Reason,
    /// Number of attempts, at least 1.
    pub attempts: u32,
    /// Times of the first and the last failure, in milliseconds since the epoch.
    pub first_failed_ms: i64,
    pub last_failed_ms: i64,
}

/// Parts of the record that its dead letter contains.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    Everything,
    /// Everything except the value.
    Headers,
    /// Only the position and the reason.
    Position,
}

impl Letter<'_> {
    /// Returns the dead letter's key in its topic, which also identifies it everywhere else.
    pub fn id(&self) -> String {
        format!("{}/{}@{} {}", self.topic, self.partition, self.record.offset(), self.group)
    }

    fn headers(&self, keep: Keep) -> OwnedHeaders {
        let (record, own) = (&self.record, self.record.headers());
        let mut headers = OwnedHeaders::new_with_capacity(24);
        if keep != Keep::Position {
            headers = own.fold(headers, |headers, (key, value)| headers.insert(Header { key, value }));
        }
        let mut add = |name, value: &[u8]| {
            let added = std::mem::take(&mut headers).insert(Header { key: name, value: Some(value) });
            headers = added;
        };
        add(header::MARK, b"1");
        add(header::TOPIC, self.topic.as_bytes());
        add(header::PARTITION, self.partition.to_string().as_bytes());
        add(header::OFFSET, record.offset().to_string().as_bytes());
        if let Some(key) = record.key().filter(|_| keep != Keep::Position) {
            add(header::KEY, key);
        }
        if record.timestamp_ms() > 0 {
            add(header::TIMESTAMP, clock::rfc3339(record.timestamp_ms()).as_bytes());
        }
        match record.value() {
            None => add(header::TOMBSTONE, b"true"),
            Some(value) if keep != Keep::Everything => add(header::VALUE_OMITTED, value.len().to_string().as_bytes()),
            Some(_) => {}
        }
        if keep == Keep::Position {
            add(header::HEADERS_OMITTED, b"true");
        }
        add(header::GROUP, self.group.as_bytes());
        let message = &self.reason.message;
        add(header::ERROR, &message.as_bytes()[..message.floor_char_boundary(MAX_MESSAGE_BYTES)]);
        add(header::ERROR_CLASS, self.reason.class.as_bytes());
        add(header::ATTEMPTS, self.attempts.to_string().as_bytes());
        add(header::FIRST_FAILED, clock::rfc3339(self.first_failed_ms).as_bytes());
        add(header::FAILED, clock::rfc3339(self.last_failed_ms).as_bytes());
        if let Some(trace) = record.header(event::TRACEPARENT).and_then(TraceContext::parse) {
            add(header::TRACE_ID, format!("{:032x}", trace.trace_id).as_bytes());
        }
        headers
    }

    fn outgoing<'a>(&'a self, topic: &'a str, id: &'a str, keep: Keep) -> Outgoing<'a> {
        let value = self.record.value().filter(|_| keep == Keep::Everything);
        Outgoing {
            topic,
            partition: None,
            key: Some(id.as_bytes()),
            // Never null, because that would be the dead letter's own tombstone.
            payload: Some(value.unwrap_or_default()),
            headers: Some(self.headers(keep)),
            timestamp_ms: None,
            extra_bytes: ROOM_BYTES as usize,
        }
    }
}

/// Writes dead letters to one dead-letter topic. Cheap to clone.
#[derive(Clone)]
pub struct DeadLetters {
    producer: Producer,
    topic: Arc<str>,
    log: Arc<Throttle>,
}

impl DeadLetters {
    /// Creates a writer for the dead-letter topic with the full name `topic`.
    pub fn new(producer: Producer, topic: String) -> Self {
        Self { producer, topic: topic.into(), log: Arc::default() }
    }

    /// Stores the dead letter on all in-sync replicas. Until this succeeds, the record is
    /// unfinished: retry later and do not commit past it. Storing the same dead letter twice leaves
    /// one.
    ///
    /// If the dead letter is too large for the topic, the value is left out; if it is still too
    /// large, the key and the record's own headers are left out as well. Headers record what was
    /// left out.
    pub async fn store(&self, letter: &Letter<'_>) -> Result<(), SendError> {
        let id = letter.id();
        let mut stored = self.producer.store(letter.outgoing(&self.topic, &id, Keep::Everything)).await;
        for keep in [Keep::Headers, Keep::Position] {
            if matches!(stored, Err(SendError::TooLarge { .. })) {
                stored = self.producer.store(letter.outgoing(&self.topic, &id, keep)).await;
            }
        }
        stored?;
        let class = letter.reason.class;
        counter!("postrider_dead_letters_total", "topic" => self.topic.to_string(), "class" => class).increment(1);
        if let Some(unsaid) = self.log.admit(Instant::now()) {
            let Letter { attempts, reason, .. } = letter;
            let (dead_letter, topic) = (&id, &*self.topic);
            tracing::warn!(dead_letter, topic, class, attempts, unsaid, "record dead-lettered");
            // The error may quote the record, or what an endpoint answered to it.
            tracing::debug!(dead_letter, error = reason.message, "error of the dead letter");
        }
        Ok(())
    }
}

/// Admits [`Throttle::LINES`] log lines in each [`Throttle::SPAN`] and counts the others.
#[derive(Default)]
struct Throttle {
    /// Start of the current span, and the number of lines since.
    state: Mutex<Option<(Instant, u32)>>,
}

impl Throttle {
    const LINES: u32 = 10;
    const SPAN: Duration = Duration::from_secs(10);

    /// Returns `Some` if the line may be written, with the number of lines that were suppressed in
    /// the previous span.
    fn admit(&self, now: Instant) -> Option<u32> {
        let mut state = self.state.lock();
        match &mut *state {
            Some((begun, count)) if now.duration_since(*begun) < Self::SPAN => {
                *count = count.saturating_add(1);
                (*count <= Self::LINES).then_some(0)
            }
            before => {
                let unsaid = before.map_or(0, |(_, count)| count.saturating_sub(Self::LINES));
                *before = Some((now, 1));
                Some(unsaid)
            }
        }
    }
}

/// Returns the required shape of a dead-letter topic. It is compacted, so that a dead letter stays
/// until its tombstone.
pub fn topic_spec(config: &Config, name: &str, partitions: i32, remedy: &str) -> TopicSpec {
    let max_bytes = config.producer.max_message_bytes.saturating_add(2 * ROOM_BYTES);
    TopicSpec {
        name: config.topic(name),
        partitions,
        settings: vec![("cleanup.policy", "compact".to_owned()), ("max.message.bytes", max_bytes.to_string())],
        required: vec![("cleanup.policy", "compact")],
        remedy: remedy.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::{
        Timestamp,
        message::{Headers, OwnedMessage},
    };

    use super::*;
    use crate::batch::Batch;

    const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn batch(key: Option<&[u8]>, value: Option<&[u8]>) -> Batch {
        let headers = OwnedHeaders::new()
            .insert(Header { key: "ce_id", value: Some("e-1") })
            .insert(Header { key: "error", value: Some("the record's own") })
            .insert(Header { key: "twice", value: Some("1") })
            .insert(Header { key: "twice", value: Some("2") })
            .insert(Header { key: "binary", value: Some(&[0_u8, 255][..]) })
            .insert(Header { key: "null", value: None::<&str> })
            .insert(Header { key: event::TRACEPARENT, value: Some(TRACEPARENT) });
        let (key, value) = (key.map(<[u8]>::to_vec), value.map(<[u8]>::to_vec));
        let time = Timestamp::CreateTime(1_672_574_400_120);
        let mut batch = Batch::default();
        batch.push(&OwnedMessage::new(value, key, "t".to_owned(), time, 3, 1234, Some(headers)));
        batch
    }

    fn with_letter<T>(batch: &Batch, message: &str, test: impl FnOnce(Letter<'_>) -> T) -> T {
        let reason = Reason { class: "refused", message: message.to_owned() };
        let record = batch.iter().next().unwrap();
        let (topic, group, reason) = ("a/messages", "kv", &reason);
        let (first_failed_ms, last_failed_ms) = (1_672_574_400_000, 1_672_574_460_000);
        test(Letter { topic, partition: 3, record, group, reason, attempts: 4, first_failed_ms, last_failed_ms })
    }

    type Pairs = Vec<(String, Option<Vec<u8>>)>;

    /// Splits headers into those before the mark and those from the mark on.
    fn split(headers: &OwnedHeaders) -> (Pairs, Pairs) {
        let mut own: Pairs =
            headers.iter().map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec))).collect();
        let mark = own.iter().rposition(|(name, _)| name == header::MARK).unwrap();
        let ours = own.split_off(mark);
        (own, ours)
    }

    fn text<'a>(ours: &'a Pairs, name: &str) -> Option<&'a str> {
        let value = ours.iter().find(|(header, _)| header == name)?.1.as_deref();
        Some(std::str::from_utf8(value.unwrap()).unwrap())
    }

    #[test]
    fn a_letter_keeps_every_header_and_has_its_position_and_reason() {
        let batch = batch(Some(b"k"), Some(b"v"));
        with_letter(&batch, "no", |letter| {
            let id = letter.id();
            assert_eq!(id, "a/messages/3@1234 kv");
            let outgoing = letter.outgoing("dead", &id, Keep::Everything);
            assert_eq!(outgoing.payload, Some(&b"v"[..]));
            let (own, ours) = split(&outgoing.headers.unwrap());
            let kept: Pairs =
                letter.record.headers().map(|(name, value)| (name.to_owned(), value.map(<[u8]>::to_vec))).collect();
            assert_eq!(own, kept);
            assert_eq!(own.len(), 7);
            for (name, expected) in [
                (header::MARK, "1"),
                (header::TOPIC, "a/messages"),
                (header::PARTITION, "3"),
                (header::OFFSET, "1234"),
                (header::KEY, "k"),
                (header::TIMESTAMP, "2023-01-01T12:00:00.120Z"),
                (header::GROUP, "kv"),
                (header::ERROR, "no"),
                (header::ERROR_CLASS, "refused"),
                (header::ATTEMPTS, "4"),
                (header::FIRST_FAILED, "2023-01-01T12:00:00.000Z"),
                (header::FAILED, "2023-01-01T12:01:00.000Z"),
                (header::TRACE_ID, "0af7651916cd43dd8448eb211c80319c"),
            ] {
                assert_eq!(text(&ours, name), Some(expected), "{name}");
            }
            assert_eq!(ours.len(), 13, "and no others: {ours:?}");
        });
    }

    #[test]
    fn a_key_of_any_bytes_is_kept_and_none_stays_none() {
        with_letter(&batch(Some(&[0, 255, 128]), Some(b"v")), "no", |letter| {
            let (_, ours) = split(&letter.headers(Keep::Everything));
            assert!(ours.contains(&(header::KEY.to_owned(), Some(vec![0, 255, 128]))), "{ours:?}");
        });
        with_letter(&batch(None, Some(b"v")), "no", |letter| {
            assert_eq!(text(&split(&letter.headers(Keep::Everything)).1, header::KEY), None);
        });
    }

    #[test]
    fn a_tombstone_becomes_a_letter_that_compaction_keeps() {
        with_letter(&batch(Some(b"k"), None), "no", |letter| {
            let outgoing = letter.outgoing("dead", "id", Keep::Everything);
            assert_eq!(outgoing.payload, Some(&b""[..]));
            assert_eq!(text(&split(&outgoing.headers.unwrap()).1, header::TOMBSTONE), Some("true"));
        });
        with_letter(&batch(Some(b"k"), Some(b"")), "no", |letter| {
            assert_eq!(text(&split(&letter.headers(Keep::Everything)).1, header::TOMBSTONE), None, "empty is not null");
        });
    }

    #[test]
    fn omitted_parts_are_named_in_headers() {
        with_letter(&batch(Some(b"k"), Some(b"12345")), &"ä".repeat(4_000), |letter| {
            let outgoing = letter.outgoing("dead", "id", Keep::Headers);
            assert_eq!(outgoing.payload, Some(&b""[..]));
            let (own, ours) = split(&outgoing.headers.unwrap());
            assert_eq!((own.len(), text(&ours, header::VALUE_OMITTED)), (7, Some("5")));
            assert_eq!(text(&ours, header::ERROR).unwrap().len(), MAX_MESSAGE_BYTES);
            let (own, ours) = split(&letter.headers(Keep::Position));
            assert_eq!((own.len(), text(&ours, header::KEY)), (0, None));
            assert_eq!(text(&ours, header::HEADERS_OMITTED), Some("true"));
        });
    }

    #[test]
    fn a_flood_of_letters_is_logged_ten_times_and_then_counted() {
        let (throttle, begun) = (Throttle::default(), Instant::now());
        let lines = (0..25).filter_map(|_| throttle.admit(begun)).collect::<Vec<_>>();
        assert_eq!(lines, [0; 10]);
        assert_eq!(throttle.admit(begun + Throttle::SPAN), Some(15));
    }
}
