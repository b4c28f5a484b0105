//! Values from a database or the wire that this version does not know, because a newer version
//! wrote them or they are damaged. They are errors and have no effect.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use metrics::counter;
use parking_lot::Mutex;

/// Shortest time between two log lines about values of one kind.
const QUIET: Duration = Duration::from_secs(10);
/// Longest part of a value that is shown, in bytes.
const SHOWN: usize = 80;

/// Time of the last log line about values of each kind.
static LOGGED: Mutex<Option<HashMap<&'static str, Instant>>> = Mutex::new(None);

/// A value that is not one of the known values.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown {what} `{value}`: a newer version may have written it")]
pub struct Unknown {
    /// Kind of the value, as in `state of a receiver`.
    pub what: &'static str,
    pub value: String,
}

impl Unknown {
    /// Creates the error; counts and logs the value.
    pub fn new(what: &'static str, value: impl ToString) -> Self {
        let mut value = value.to_string();
        value.truncate(value.floor_char_boundary(SHOWN));
        counter!("postrider_unknown_values_total", "what" => what).increment(1);
        let now = Instant::now();
        let mut logged = LOGGED.lock();
        let last = logged.get_or_insert_default().insert(what, now);
        match last.filter(|last| now.duration_since(*last) < QUIET) {
            // Only a line that is written starts a new interval.
            Some(last) => {
                logged.get_or_insert_default().insert(what, last);
            }
            None => tracing::warn!(what, value, "unknown value ignored"),
        }
        drop(logged);
        Self { what, value }
    }

    /// Like [`Self::new`], for bytes.
    pub fn of_bytes(what: &'static str, value: &[u8]) -> Self {
        Self::new(what, String::from_utf8_lossy(&value[..value.len().min(SHOWN)]))
    }
}
