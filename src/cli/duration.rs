//! Parses durations given on the command line.

use std::{str::FromStr, time::Duration};

/// Units of Go's `time.ParseDuration`, in seconds.
const UNITS: [(&str, f64); 7] =
    [("ns", 1e-9), ("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3_600.0)];

/// The error of text that is not a duration.
#[derive(Debug, thiserror::Error)]
#[error("`{text}` is not a duration; write 30s, 500ms, 1m30s or a number of seconds")]
pub struct Error {
    text: String,
}

/// A duration as an argument; see [`parse`].
#[derive(Debug, Clone, Copy)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text).map(Self)
    }
}

/// Parses Go's notation (`30s`, `500ms`, `1m30s`, `1.5h`) or a number of seconds (`30`, `0.5`).
pub fn parse(text: &str) -> Result<Duration, Error> {
    let wrong = || Error { text: text.to_owned() };
    let mut rest = text.trim();
    if let Ok(seconds) = rest.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).map_err(|_| wrong());
    }
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.').ok_or_else(wrong)?;
        let number: f64 = rest[..digits].parse().map_err(|_| wrong())?;
        rest = &rest[digits..];
        let (name, seconds) = UNITS.iter().find(|(name, _)| unit_of(rest) == *name).ok_or_else(wrong)?;
        rest = &rest[name.len()..];
        let part = Duration::try_from_secs_f64(number * seconds).map_err(|_| wrong())?;
        total = total.checked_add(part).ok_or_else(wrong)?;
    }
    if text.trim().is_empty() { Err(wrong()) } else { Ok(total) }
}

/// Returns the letters before the next number.
fn unit_of(text: &str) -> &str {
    let end = text.find(|letter: char| letter.is_ascii_digit() || letter == '.').unwrap_or(text.len());
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_notation_and_plain_seconds_are_parsed() {
        for (text, ms) in [
            ("30s", 30_000),
            ("500ms", 500),
            ("1m", 60_000),
            ("1m30s", 90_000),
            ("1.5h", 5_400_000),
            ("2h45m", 9_900_000),
            ("1500us", 1),
            ("0", 0),
            ("0s", 0),
            ("30", 30_000),
            ("0.25", 250),
            (" 5s ", 5_000),
        ] {
            assert_eq!(parse(text).unwrap().as_millis(), ms, "{text}");
        }
    }

    #[test]
    fn invalid_durations_are_rejected() {
        for text in ["", " ", "s", "soon", "-1s", "-1", "1 s", "1d", "1ss", "5m3", "NaN", "inf", "1e99h", "..s"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
