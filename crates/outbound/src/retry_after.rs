//! Parses `Retry-After` (RFC 9110, 10.2.3): seconds, or a date.

use std::time::{Duration, SystemTime};

/// Returns the wait that an answer asks for, at most `cap`. A date in the past means no wait.
pub fn parse(value: &[u8], now: SystemTime, cap: Duration) -> Option<Duration> {
    let text = std::str::from_utf8(value).ok()?.trim();
    if text.is_empty() {
        return None;
    }
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        // A number that does not fit is longer than any cap.
        return Some(text.parse().map_or(cap, Duration::from_secs).min(cap));
    }
    let until = httpdate::parse_http_date(text).ok()?;
    Some(until.duration_since(now).unwrap_or(Duration::ZERO).min(cap))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    fn at(text: &str) -> Option<Duration> {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        parse(text.as_bytes(), now, HOUR)
    }

    #[test]
    fn seconds_and_dates_are_read_and_capped() {
        let seconds = |count| Some(Duration::from_secs(count));
        assert_eq!(at("120"), seconds(120));
        assert_eq!(at(" 0 "), seconds(0));
        assert_eq!(at("Sun, 06 Nov 1994 08:50:37 GMT"), seconds(60));
        assert_eq!(at("Sunday, 06-Nov-94 08:49:38 GMT"), seconds(1));
        assert_eq!(at("Sun, 06 Nov 1994 08:00:00 GMT"), seconds(0), "the date is in the past");
        for long in ["86400", "99999999999999999999999", "Sat, 06 Nov 2094 08:49:37 GMT"] {
            assert_eq!(at(long), Some(HOUR), "{long}");
        }
        for bad in ["", "-1", "1.5", "soon", "Sun, 06 Nov 1994"] {
            assert_eq!(at(bad), None, "{bad}");
        }
    }
}
