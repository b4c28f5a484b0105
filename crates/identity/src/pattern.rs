//! Patterns of topic names in scopes.

use std::{fmt, str::FromStr};

/// Longest pattern, in bytes.
const MAX_BYTES: usize = 249;

/// Pattern of topic names: `*` is any text, `{sub}` and `{tenant}` are those of the principal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Any,
    Subject,
    Tenant,
}

/// Error of a text that is not a pattern.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPattern {
    #[error("a pattern has 1 to {MAX_BYTES} bytes (got {0})")]
    Length(usize),
    #[error("`{0}` in a pattern is neither part of a topic's name nor `*`, `{{sub}}` or `{{tenant}}`")]
    Character(char),
}

impl Pattern {
    /// Returns whether this topic matches. A subject or tenant that is not a single word of letters,
    /// digits, `_` and `-` matches nothing: with a dot it could reach into the names of another, as
    /// `a` into the topics `a.b.*` of a tenant `a.b`.
    pub fn matches(&self, topic: &str, subject: &str, tenant: Option<&str>) -> bool {
        let mut filled = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            filled.push(match part {
                Part::Any => None,
                Part::Text(text) => Some(text.as_str()),
                Part::Subject if is_word(subject) => Some(subject),
                Part::Tenant if tenant.is_some_and(is_word) => tenant,
                Part::Subject | Part::Tenant => return false,
            });
        }
        glob(&filled, topic)
    }
}

fn is_word(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
}

/// Matches texts, and `None` for any text. Continues from the last `None` when a text does not fit,
/// so it takes at most the product of both lengths.
fn glob(parts: &[Option<&str>], text: &str) -> bool {
    let Some((first, rest)) = parts.split_first() else { return text.is_empty() };
    match first {
        Some(literal) => text.strip_prefix(*literal).is_some_and(|text| glob(rest, text)),
        None => {
            // Up to the next `None` the earliest place is as good as any other.
            let until = rest.iter().position(Option::is_none);
            match until {
                None => {
                    let tail: String = rest.iter().flatten().copied().collect();
                    text.ends_with(&tail)
                }
                Some(until) => {
                    let middle: String = rest[..until].iter().flatten().copied().collect();
                    let found = text.find(&middle).map(|at| &text[at + middle.len()..]);
                    found.is_some_and(|text| glob(&rest[until..], text))
                }
            }
        }
    }
}

impl FromStr for Pattern {
    type Err = BadPattern;

    fn from_str(text: &str) -> Result<Self, BadPattern> {
        if text.is_empty() || text.len() > MAX_BYTES {
            return Err(BadPattern::Length(text.len()));
        }
        let (mut parts, mut rest) = (Vec::new(), text);
        while let Some(first) = rest.chars().next() {
            let (part, after) = if let Some(after) = rest.strip_prefix('*') {
                (Part::Any, after)
            } else if let Some(after) = rest.strip_prefix("{sub}") {
                (Part::Subject, after)
            } else if let Some(after) = rest.strip_prefix("{tenant}") {
                (Part::Tenant, after)
            } else {
                let is_legal = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
                let length = rest.bytes().take_while(|&byte| is_legal(byte)).count();
                if length == 0 {
                    return Err(BadPattern::Character(first));
                }
                (Part::Text(rest[..length].to_owned()), &rest[length..])
            };
            parts.push(part);
            rest = after;
        }
        Ok(Self { text: text.to_owned(), parts })
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matches(pattern: &str, topic: &str) -> bool {
        pattern.parse::<Pattern>().unwrap().matches(topic, "ann", Some("acme"))
    }

    #[test]
    fn stars_stand_for_any_text_and_the_names_for_themselves() {
        for (pattern, topic) in [
            ("*", "orders"),
            ("orders.*", "orders.eu"),
            ("*.eu", "orders.eu"),
            ("o*.*s", "orders.eu.x.s"),
            ("a*b*c", "abbc"),
            ("{tenant}.*", "acme.orders"),
            ("u-{sub}-*-{tenant}", "u-ann-x-acme"),
            ("orders", "orders"),
        ] {
            assert!(matches(pattern, topic), "{pattern} {topic}");
        }
        for (pattern, topic) in [
            ("orders.*", "orders"),
            ("orders", "orders2"),
            ("a*b*c", "acb"),
            ("*a*a*", "a"),
            ("{tenant}.*", "other.acme.orders"),
            ("{sub}", "acme"),
        ] {
            assert!(!matches(pattern, topic), "{pattern} {topic}");
        }
    }

    #[test]
    fn a_name_that_is_not_a_word_matches_nothing() {
        let pattern: Pattern = "{tenant}.*".parse().unwrap();
        for tenant in [Some("*"), Some(""), Some("a.b"), Some("a b"), Some("{sub}"), None] {
            for topic in ["a.b.c", "*.x", ".x", "a b.c", "ann.x", "{sub}.x"] {
                assert!(!pattern.matches(topic, "ann", tenant), "{tenant:?} {topic}");
            }
        }
        assert!(!"{sub}*".parse::<Pattern>().unwrap().matches("ann@x", "ann@x", None));
    }

    #[test]
    fn other_characters_are_refused() {
        for (text, error) in [
            ("", BadPattern::Length(0)),
            ("a b", BadPattern::Character(' ')),
            ("{role}", BadPattern::Character('{')),
            ("a/ä", BadPattern::Character('/')),
        ] {
            assert_eq!(text.parse::<Pattern>(), Err(error), "{text}");
        }
    }

    /// The definition, character by character.
    fn slow(pattern: &[u8], text: &[u8]) -> bool {
        match (pattern.split_first(), text.split_first()) {
            (None, rest) => rest.is_none(),
            (Some((b'*', rest)), None) => slow(rest, text),
            (Some((b'*', rest)), Some((_, after))) => slow(rest, text) || slow(pattern, after),
            (Some((a, rest)), Some((b, after))) => a == b && slow(rest, after),
            (Some(_), None) => false,
        }
    }

    proptest! {
        #[test]
        fn it_matches_as_defined(pattern in "[ab*]{1,8}", topic in "[ab]{0,10}") {
            prop_assert_eq!(matches(&pattern, &topic), slow(pattern.as_bytes(), topic.as_bytes()));
        }
    }
}
