//! Values that must not be printed: single values, maps of them, and some properties of client
//! libraries.

use std::{cell::Cell, collections::BTreeMap, fmt, ops::Deref};

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use super::url::{MASK, masked};

thread_local! {
    /// Set while defaults are rendered for the docs. They are not masked, because they are public
    /// in the code.
    pub(super) static DEFAULTS: Cell<bool> = const { Cell::new(false) };
}

/// A value that must not be printed. `Debug` and `Serialize` show `********`.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// Returns the plain value, to pass to a client library.
    pub fn expose(&self) -> &str {
        &self.0
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASK)
    }
}

impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let shown = if self.0.is_empty() || DEFAULTS.get() { &self.0 } else { MASK };
        serializer.serialize_str(shown)
    }
}

impl JsonSchema for Secret {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Secret".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({ "type": "string", "format": "password" })
    }
}

/// Named values that must not be printed, such as headers. In a file or variable, each value is
/// text, or `{file: /path}`, which is read at start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secrets(BTreeMap<String, Secret>);

impl Deref for Secrets {
    type Target = BTreeMap<String, Secret>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl FromIterator<(String, Secret)> for Secrets {
    fn from_iter<I: IntoIterator<Item = (String, Secret)>>(entries: I) -> Self {
        Self(entries.into_iter().collect())
    }
}

impl JsonSchema for Secrets {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Secrets".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({ "type": "object", "additionalProperties": { "anyOf": [
            { "type": "string", "format": "password" },
            { "type": "object", "additionalProperties": false, "required": ["file"],
              "properties": { "file": { "type": "string" } } },
        ] } })
    }
}

/// Properties of a client library. `Debug` and `Serialize` mask the values of properties whose
/// names mark them as credentials, and the credentials in URLs.
#[derive(Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline)]
pub struct Properties(BTreeMap<String, String>);

impl Properties {
    fn shown(&self) -> BTreeMap<&str, String> {
        let show = |(name, value): (&String, &String)| match () {
            () if is_telling(name) => MASK.to_owned(),
            () if value.contains("://") => masked(value),
            () => value.clone(),
        };
        self.0.iter().map(|entry| (entry.0.as_str(), show(entry))).collect()
    }
}

impl Deref for Properties {
    type Target = BTreeMap<String, String>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl FromIterator<(String, String)> for Properties {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(entries: I) -> Self {
        Self(entries.into_iter().collect())
    }
}

impl fmt::Debug for Properties {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.shown().fmt(f)
    }
}

impl Serialize for Properties {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.shown().serialize(serializer)
    }
}

/// Words in the names of properties whose values are credentials, such as `sasl.password` and
/// `ssl.key.pem`.
const CREDENTIAL_WORDS: [&str; 8] =
    ["password", "secret", "token", "credential", "private", "key.pem", "jaas", "oauthbearer.config"];

/// Returns whether the name of a property marks its value as a credential.
pub fn is_telling(name: &str) -> bool {
    let name = name.to_lowercase();
    CREDENTIAL_WORDS.iter().any(|word| name.contains(word))
}
