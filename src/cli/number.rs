//! Parses numbers given on the command line. The errors say what is wanted.

use std::str::FromStr;

/// The error of an argument that is not such a number.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("it must be {0}")]
pub struct Wrong(&'static str);

/// Parses a whole number, 1 or more.
pub fn count<T: FromStr + From<u8> + PartialOrd>(text: &str) -> Result<T, Wrong> {
    at_least(text, 1).ok_or(Wrong("a whole number, 1 or more"))
}

/// Parses a whole number, 0 or more.
pub fn natural<T: FromStr + From<u8> + PartialOrd>(text: &str) -> Result<T, Wrong> {
    at_least(text, 0).ok_or(Wrong("a whole number, 0 or more"))
}

/// Parses the number of a partition.
pub fn partition(text: &str) -> Result<i32, Wrong> {
    at_least(text, 0).ok_or(Wrong("the number of a partition, 0 or more"))
}

/// Parses a number of requests per second, 0 for no limit.
pub fn rate(text: &str) -> Result<f64, Wrong> {
    let rate = text.parse().ok().filter(|rate: &f64| rate.is_finite() && *rate >= 0.0);
    rate.ok_or(Wrong("a number of requests per second, 0 or more"))
}

fn at_least<T: FromStr + From<u8> + PartialOrd>(text: &str, least: u8) -> Option<T> {
    text.parse().ok().filter(|number| *number >= T::from(least))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_of_a_number_says_what_is_wanted() {
        assert_eq!((count::<u32>("1"), natural::<usize>("0"), rate("0.5")), (Ok(1), Ok(0), Ok(0.5)));
        for text in ["0", "-1", "x", "", "1.5", "99999999999999999999"] {
            assert_eq!(count::<u64>(text).unwrap_err().to_string(), "it must be a whole number, 1 or more", "{text}");
        }
        for text in ["-1", "x", "", "3000000000"] {
            assert_eq!(partition(text), Err(Wrong("the number of a partition, 0 or more")), "{text}");
        }
        for text in ["-1", "fast", "", "NaN", "inf"] {
            assert!(rate(text).is_err(), "{text}");
        }
    }
}
