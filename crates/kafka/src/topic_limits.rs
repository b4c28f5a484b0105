//! Limits that the settings of a topic put on its records.

use std::collections::HashMap;

/// Limits that the broker applies to the records of a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopicLimits {
    /// True if each record needs a key because the topic is compacted.
    pub needs_key: bool,
    /// Largest batch in bytes (`max.message.bytes`).
    pub max_message_bytes: usize,
    /// Maximum distance of a record's timestamp before and after the broker's clock, in
    /// milliseconds (`message.timestamp.before.max.ms`, `message.timestamp.after.max.ms`).
    pub max_before_ms: i64,
    pub max_after_ms: i64,
    /// Age from which the topic may delete records (`retention.ms`), by their timestamps.
    pub retention_ms: i64,
}

impl Default for TopicLimits {
    /// Returns no limits, for a topic whose settings cannot be read.
    fn default() -> Self {
        let unlimited_ms = i64::MAX;
        Self {
            needs_key: false,
            max_message_bytes: usize::MAX,
            max_before_ms: unlimited_ms,
            max_after_ms: unlimited_ms,
            retention_ms: unlimited_ms,
        }
    }
}

impl TopicLimits {
    pub(super) fn read(settings: &HashMap<String, String>) -> Self {
        let number = |name: &str| settings.get(name).and_then(|value| value.parse::<i64>().ok()).filter(|&n| n >= 0);
        // Brokers before 3.6 have one setting for both directions.
        let both = number("message.timestamp.difference.max.ms").unwrap_or(i64::MAX);
        let [before, after] = ["before", "after"].map(|way| number(&format!("message.timestamp.{way}.max.ms")));
        let uses_broker_time = settings.get("message.timestamp.type").is_some_and(|kind| kind == "LogAppendTime");
        let bound = |found: Option<i64>| if uses_broker_time { i64::MAX } else { found.unwrap_or(both) };
        let deletes = has_policy(settings, "delete");
        Self {
            needs_key: has_policy(settings, "compact"),
            max_message_bytes: number("max.message.bytes").map_or(usize::MAX, |bytes| bytes as usize),
            max_before_ms: bound(before),
            max_after_ms: bound(after),
            retention_ms: number("retention.ms")
                .filter(|&ms| ms > 0 && deletes && !uses_broker_time)
                .unwrap_or(i64::MAX),
        }
    }
}

/// Returns whether a topic has a clean-up policy: `compact` or `delete`.
pub(super) fn has_policy(settings: &HashMap<String, String>, wanted: &str) -> bool {
    settings.get("cleanup.policy").is_some_and(|policies| policies.split(',').any(|policy| policy.trim() == wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(settings: &[(&str, &str)]) -> TopicLimits {
        TopicLimits::read(&settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn limits_are_read_from_the_settings_of_newer_and_older_brokers() {
        let newer = [
            ("cleanup.policy", "compact,delete"),
            ("max.message.bytes", "10000"),
            ("message.timestamp.type", "CreateTime"),
            ("message.timestamp.before.max.ms", "9223372036854775807"),
            ("message.timestamp.after.max.ms", "3600000"),
            ("retention.ms", "604800000"),
        ];
        let expected = TopicLimits {
            needs_key: true,
            max_message_bytes: 10_000,
            max_before_ms: i64::MAX,
            max_after_ms: 3_600_000,
            retention_ms: 604_800_000,
        };
        assert_eq!(limits(&newer), expected);
        let older = limits(&[("cleanup.policy", "delete"), ("message.timestamp.difference.max.ms", "60000")]);
        assert_eq!(older, TopicLimits { max_before_ms: 60_000, max_after_ms: 60_000, ..TopicLimits::default() });
        let only_compacted = limits(&[("cleanup.policy", "compact"), newer[5]]);
        assert_eq!(only_compacted, TopicLimits { needs_key: true, ..TopicLimits::default() });
        let unlimited = limits(&[("cleanup.policy", "delete"), ("retention.ms", "-1")]);
        assert_eq!(unlimited, TopicLimits::default());
        let deletes = ("cleanup.policy", "delete");
        let broker_time = [deletes, newer[3], newer[4], newer[5], ("message.timestamp.type", "LogAppendTime")];
        assert_eq!(limits(&broker_time), TopicLimits::default());
        assert_eq!(limits(&[]), TopicLimits::default());
    }
}
