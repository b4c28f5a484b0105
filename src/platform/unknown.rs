//! Values from a database or the wire that this version does not know: a newer version wrote them, or they are damaged.
//! They are errors, which have no effect.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use metrics::counter;

/// Between two log lines about values of one kind.
const QUIET: Duration = Duration::from_secs(10);
/// Bytes of a value that are shown.
const SHOWN: usize = 80;

/// When values of each kind were logged last.
static LOGGED: Mutex<Option<HashMap<&'static str, Instant>>> = Mutex::new(None);

/// A value that is not one of those that exist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown {what} `{value}`: a newer version may have written it")]
pub struct Unknown {
    /// What the value should say, as in `state of a receiver`.
    pub what: &'static str,
    pub value: String,
}

impl Unknown {
    /// Counts and logs the value.
    pub fn new(what: &'static str, value: impl ToString) -> Self {
        let mut value = value.to_string();
        value.truncate(value.floor_char_boundary(SHOWN));
        counter!("postrider_unknown_values_total", "what" => what).increment(1);
        let now = Instant::now();
        let mut logged = LOGGED.lock().unwrap_or_else(PoisonError::into_inner);
        let last = logged.get_or_insert_default().insert(what, now);
        match last.filter(|last| now.duration_since(*last) < QUIET) {
            // Only lines that are written begin a new span.
            Some(last) => {
                logged.get_or_insert_default().insert(what, last);
            }
            None => tracing::warn!(what, value, "met a value that this version does not know; it has no effect"),
        }
        drop(logged);
        Self { what, value }
    }

    /// The same for bytes.
    pub fn of_bytes(what: &'static str, value: &[u8]) -> Self {
        Self::new(what, String::from_utf8_lossy(&value[..value.len().min(SHOWN)]))
    }
}
