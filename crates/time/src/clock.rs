//! Wall-clock time in the formats that are sent and stored.

use std::time::{SystemTime, UNIX_EPOCH};

use jiff::{Timestamp, fmt::temporal::DateTimePrinter};

/// Returns the milliseconds since the Unix epoch.
pub fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// Formats a time in milliseconds as RFC 3339 in UTC with three decimals; empty when out of range.
pub fn rfc3339(ms: i64) -> String {
    const PRINTER: DateTimePrinter = DateTimePrinter::new().precision(Some(3));
    Timestamp::from_millisecond(ms).map(|time| PRINTER.timestamp_to_string(&time)).unwrap_or_default()
}

/// Parses an RFC 3339 time into milliseconds since the Unix epoch.
pub fn parse_rfc3339(text: &str) -> Option<i64> {
    text.parse::<Timestamp>().ok().map(Timestamp::as_millisecond)
}

/// Parses a span such as `90s`, `15m`, `2h` or `7d` into milliseconds.
pub fn parse_span_ms(text: &str) -> Option<i64> {
    let (count, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let unit_ms = match unit {
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    i64::from(count.parse::<u32>().ok()?).checked_mul(unit_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_formatted_with_milliseconds_and_parsed() {
        assert_eq!(rfc3339(1_672_574_400_120), "2023-01-01T12:00:00.120Z");
        assert_eq!(parse_rfc3339("2023-01-01T13:00:00.12+01:00"), Some(1_672_574_400_120));
        assert_eq!(parse_rfc3339("yesterday"), None);
    }
}
