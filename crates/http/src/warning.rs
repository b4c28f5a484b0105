//! Warnings of names in a request that are unknown and near a known one: the header
//! `Postrider-Warning` of the answer, and a metric.
//!
//! Whatever decodes a part of a request notes near misses for the current thread, and the outer
//! layer takes them after each poll of the handler, which is the only code that runs in between.

use std::cell::{Cell, RefCell};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use metrics::counter;

use super::decode::shortened;

static POSTRIDER_WARNING: HeaderName = HeaderName::from_static("postrider-warning");

/// Maximum number of near misses of a request that are named, and of unknown names that are
/// compared.
const MAX_NAMED: usize = 3;
const MAX_COMPARED: usize = 32;
/// Longest name that is compared, in bytes: no known name is near a longer one.
const MAX_BYTES: usize = 64;

thread_local! {
    /// True if [`NOTED`] has something; cheaper to look at.
    static ANY: Cell<bool> = const { Cell::new(false) };
    static NOTED: RefCell<Vec<NearMiss>> = const { RefCell::new(Vec::new()) };
}

/// The part of a request that a name is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Fields of a body.
    Field,
    /// Parameters in the query.
    Parameter,
}

impl Source {
    pub fn word(self) -> &'static str {
        match self {
            Self::Field => "field",
            Self::Parameter => "parameter",
        }
    }
}

/// An unknown name that is near a known one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NearMiss {
    source: Source,
    name: String,
    meant: &'static str,
}

impl std::fmt::Display for NearMiss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "unknown {} `{}`; did you mean `{}`?", self.source.word(), self.name, self.meant)
    }
}

/// Returns the known name that is near this one.
pub fn nearest(known: &[&'static str], name: &str) -> Option<&'static str> {
    if name.len() > MAX_BYTES { None } else { postrider_config::nearest(known.iter().copied(), name) }
}

/// Returns the unknown names that are near one of `absent`: known names that the request does not
/// have.
pub fn near_misses<'n>(
    source: Source,
    unknown: impl Iterator<Item = &'n str>,
    absent: &[&'static str],
) -> Vec<NearMiss> {
    let near = unknown.take(MAX_COMPARED).filter_map(|name| {
        let meant = nearest(absent, name)?;
        Some(NearMiss { source, name: shortened(name).escape_default().to_string(), meant })
    });
    near.take(MAX_NAMED).collect()
}

/// Notes near misses for the answer to the current request.
pub fn note(near_misses: &mut Vec<NearMiss>) {
    if !near_misses.is_empty() {
        ANY.set(true);
        NOTED.with_borrow_mut(|noted| noted.append(near_misses));
    }
}

/// Takes what was noted since the last call on this thread.
#[inline]
pub(super) fn take() -> Vec<NearMiss> {
    if ANY.replace(false) { NOTED.take() } else { Vec::new() }
}

/// Counts near misses.
pub fn count(route: &str, near_misses: &[NearMiss]) {
    for near_miss in near_misses {
        counter!("postrider_http_near_misses_total", "http_route" => route.to_owned(), "in" => near_miss.source.word())
            .increment(1);
    }
}

/// Names near misses in the headers of an answer.
pub(super) fn name(headers: &mut HeaderMap, near_misses: &[NearMiss]) {
    for near_miss in near_misses.iter().take(MAX_NAMED) {
        if let Ok(value) = HeaderValue::try_from(near_miss.to_string()) {
            headers.append(POSTRIDER_WARNING.clone(), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_found_and_others_are_not() {
        let known = ["key", "value", "ttl_seconds"];
        let near = |name: &'static str| near_misses(Source::Field, [name].into_iter(), &known);
        assert_eq!(near("ttlSeconds")[0].to_string(), "unknown field `ttlSeconds`; did you mean `ttl_seconds`?");
        assert_eq!(near("tags"), []);
        assert_eq!(near(Box::leak("k".repeat(100_000).into_boxed_str())), []);
        let many = near_misses(Source::Parameter, std::iter::repeat_n("keys", 1_000), &known);
        assert_eq!(many.len(), MAX_NAMED);
    }

    #[test]
    fn a_name_from_a_request_cannot_break_the_header() {
        let near = near_misses(Source::Field, ["ttl\r\nseconds\u{e4}"].into_iter(), &["ttl_seconds"]);
        let mut headers = HeaderMap::new();
        name(&mut headers, &near);
        let value = headers.get("postrider-warning").unwrap().to_str().unwrap();
        assert_eq!(value, "unknown field `ttl\\u{fffd}\\u{fffd}seconds\\u{e4}`; did you mean `ttl_seconds`?");
    }

    #[test]
    fn what_was_noted_is_taken_once() {
        assert!(take().is_empty());
        let mut near = near_misses(Source::Field, ["keys"].into_iter(), &["key"]);
        note(&mut near);
        assert_eq!((take().len(), take().len(), near.len()), (1, 0, 0));
    }
}
