//! Errors of decoding that say where a value does not fit, what was found and what is wanted.

use std::fmt::{self, Display};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::{self, Expected, Unexpected};

/// Maximum number of characters of a value or name from a request that an error repeats.
const MAX_QUOTED: usize = 64;
/// Length of a pointer or a path of names after which the remaining steps are left out, in bytes.
const MAX_PATH: usize = 512;

/// Characters that a fragment of a URI may contain (RFC 3986, section 3.5), besides letters and
/// digits.
const FRAGMENT: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~')
    .remove(b'!')
    .remove(b'$')
    .remove(b'&')
    .remove(b'\'')
    .remove(b'(')
    .remove(b')')
    .remove(b'*')
    .remove(b'+')
    .remove(b',')
    .remove(b';')
    .remove(b'=')
    .remove(b':')
    .remove(b'@')
    .remove(b'/')
    .remove(b'?');

/// One step from a value to a value inside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Field(String),
    Item(usize),
}

/// The rule that a value breaks.
#[derive(Debug, PartialEq, Eq)]
pub enum Flaw {
    /// The value has the wrong type.
    Type {
        wanted: String,
    },
    /// The value has the right type and is out of range.
    Value {
        wanted: String,
    },
    Missing,
    Duplicate,
    Unknown,
    /// Any other rule. The text continues a sentence that begins with the field's name.
    Other(String),
}

/// A value that does not fit, with its place.
#[derive(Debug, PartialEq, Eq)]
pub struct Fault {
    /// Steps to the value, the last one first.
    steps: Vec<Step>,
    pub flaw: Flaw,
    /// The value that was found.
    found: Option<String>,
}

impl Fault {
    pub fn new(flaw: Flaw) -> Self {
        Self { steps: Vec::new(), flaw, found: None }
    }

    /// Returns the error of a value of the wrong type.
    pub fn of_type(wanted: &dyn Expected) -> Self {
        Self::new(Flaw::Type { wanted: words(wanted) })
    }

    /// Returns the error of a value out of range.
    pub fn of_value(wanted: &dyn Expected) -> Self {
        Self::new(Flaw::Value { wanted: words(wanted) })
    }

    /// Adds the step that leads from the outer value to this one.
    pub fn under(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }

    /// Adds what was found, unless an inner value has done so.
    pub fn found(mut self, found: impl FnOnce() -> String) -> Self {
        let tells = matches!(self.flaw, Flaw::Type { .. } | Flaw::Value { .. } | Flaw::Other(_));
        if tells && self.found.is_none() {
            self.found = Some(found());
        }
        self
    }

    /// Returns the first name on the way to the value, such as that of a query parameter.
    pub fn root(&self) -> Option<&str> {
        match self.steps.last()? {
            Step::Field(name) => Some(name),
            Step::Item(_) => None,
        }
    }

    /// Returns the JSON pointer as a fragment, such as `#/headers/a`. Long ones are cut.
    pub fn pointer(&self) -> String {
        let mut pointer = "#".to_owned();
        for step in self.steps.iter().rev() {
            if pointer.len() > MAX_PATH {
                pointer.push_str(&segment("…"));
                break;
            }
            match step {
                Step::Field(name) => pointer.push_str(&segment(name)),
                Step::Item(at) => pointer.push_str(&format!("/{at}")),
            }
        }
        pointer
    }

    fn name(&self) -> String {
        let mut name = String::new();
        for step in self.steps.iter().rev() {
            if name.len() > MAX_PATH {
                name.push('…');
                break;
            }
            match step {
                Step::Field(field) if name.is_empty() => name.push_str(&shortened(field)),
                Step::Field(field) => name.push_str(&format!(".{}", shortened(field))),
                Step::Item(at) => name.push_str(&format!("[{at}]")),
            }
        }
        name
    }
}

/// Returns the segment of a JSON pointer, as part of a fragment. A long name is cut.
pub fn segment(name: &str) -> String {
    let escaped = cut(name, |character| character).replace('~', "~0").replace('/', "~1");
    format!("/{}", utf8_percent_encode(&escaped, FRAGMENT))
}

/// Returns the beginning of a text from a request, without control characters.
pub fn shortened(text: &str) -> String {
    cut(text, |character| if character.is_control() { '\u{fffd}' } else { character })
}

/// Describes a text in an error: its beginning in quotes, or that it is empty.
pub fn quoted(text: &str) -> String {
    if text.is_empty() { "an empty value".to_owned() } else { format!("`{}`", shortened(text)) }
}

/// Returns the beginning of a text, with each character replaced.
fn cut(text: &str, replace: fn(char) -> char) -> String {
    let mut characters = text.chars();
    let mut short: String = characters.by_ref().take(MAX_QUOTED).map(replace).collect();
    if characters.next().is_some() {
        short.push('…');
    }
    short
}

impl Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.steps.is_empty() {
            true => "the value".to_owned(),
            false => format!("`{}`", self.name()),
        };
        match &self.flaw {
            Flaw::Type { wanted } | Flaw::Value { wanted } => write!(f, "{name} must be {wanted}")?,
            Flaw::Missing => write!(f, "{name} is missing")?,
            Flaw::Duplicate => write!(f, "{name} must be given only once")?,
            Flaw::Unknown => write!(f, "unknown field {name}")?,
            Flaw::Other(rule) => write!(f, "{name} {rule}")?,
        }
        self.found.as_ref().map_or(Ok(()), |found| write!(f, " (got {found})"))
    }
}

impl std::error::Error for Fault {}

impl de::Error for Fault {
    fn custom<T: Display>(message: T) -> Self {
        Self::new(Flaw::Other(message.to_string()))
    }

    fn invalid_type(_: Unexpected<'_>, wanted: &dyn Expected) -> Self {
        Self::of_type(wanted)
    }

    fn invalid_value(_: Unexpected<'_>, wanted: &dyn Expected) -> Self {
        Self::of_value(wanted)
    }

    fn unknown_variant(_: &str, known: &'static [&'static str]) -> Self {
        Self::new(Flaw::Type { wanted: one_of(known) })
    }

    fn unknown_field(field: &str, _: &'static [&'static str]) -> Self {
        Self::new(Flaw::Unknown).under(Step::Field(field.to_owned()))
    }

    fn missing_field(field: &'static str) -> Self {
        Self::new(Flaw::Missing).under(Step::Field(field.to_owned()))
    }

    fn duplicate_field(field: &'static str) -> Self {
        Self::new(Flaw::Duplicate).under(Step::Field(field.to_owned()))
    }
}

/// Returns the words for a choice of texts.
pub fn one_of(known: &[&str]) -> String {
    known.iter().map(|one| format!("`{one}`")).collect::<Vec<_>>().join(" or ")
}

/// Translates what serde's own types expect from the words of Rust to those of JSON.
fn words(wanted: &dyn Expected) -> String {
    let wanted = wanted.to_string();
    let plain = match &*wanted {
        "u8" => "a whole number from 0 to 255",
        "u16" => "a whole number from 0 to 65535",
        "u32" => "a whole number from 0 to 4294967295",
        "u64" | "usize" => "a whole number from 0 to 18446744073709551615",
        "i32" => "a whole number from -2147483648 to 2147483647",
        "i64" | "isize" => "a whole number from -9223372036854775808 to 9223372036854775807",
        "f32" | "f64" => "a number",
        "a boolean" => "`true` or `false`",
        "a map" => "an object",
        "a sequence" => "an array",
        structure if structure.starts_with("struct ") => "an object",
        _ => return wanted,
    };
    plain.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pointer_is_escaped_as_a_fragment() {
        let fault = Fault::new(Flaw::Missing)
            .under(Step::Field("a/b~c".to_owned()))
            .under(Step::Item(3))
            .under(Step::Field("ä %\"".to_owned()));
        assert_eq!(fault.pointer(), "#/%C3%A4%20%25%22/3/a~1b~0c");
        assert_eq!(fault.to_string(), "`ä %\"[3].a/b~c` is missing");
        assert_eq!(Fault::new(Flaw::Missing).pointer(), "#");
    }

    #[test]
    fn a_pointer_stays_short_whatever_the_names_and_the_depth() {
        let long = "\u{1}".repeat(1 << 20);
        let fault = Fault::new(Flaw::Unknown).under(Step::Field(long.clone()));
        assert_eq!(fault.pointer(), format!("#/{}%E2%80%A6", "%01".repeat(MAX_QUOTED)));
        let deep =
            (0..100_000).fold(Fault::new(Flaw::Missing), |fault, _| fault.under(Step::Field(long[..64].to_owned())));
        let (pointer, text) = (deep.pointer(), deep.to_string());
        assert!(pointer.len() < 2 * MAX_PATH && pointer.ends_with("/%E2%80%A6"), "{pointer}");
        assert!(text.len() < 2 * MAX_PATH && text.ends_with("…` is missing"), "{text}");
        assert_eq!(segment("a\tb"), "/a%09b", "a pointer names the field exactly");
    }

    #[test]
    fn long_texts_are_shortened_and_have_no_control_characters() {
        assert_eq!(shortened("a\r\nb"), "a\u{fffd}\u{fffd}b");
        assert_eq!(shortened(&"ä".repeat(65)), format!("{}…", "ä".repeat(64)));
        assert_eq!(shortened(&"ä".repeat(64)), "ä".repeat(64));
    }
}
