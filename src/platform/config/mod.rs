//! Configuration: defaults in code < `postrider.yaml` < `POSTRIDER_*` < flags.
//!
//! Every value knows where it came from, a key that does not exist is an error that names the
//! nearest one that does, and secrets can be read from mounted files through `…_file` keys.

mod keys;
mod layers;
mod render;

pub use keys::{Key, Kind, known_keys};
pub use layers::{Loaded, Overrides, load};
pub use render::{markdown_table, schema, show};

use std::{cell::Cell, fmt};

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

/// What can be wrong with a configuration; every message says which key and which source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {path}: {source}")]
    Unreadable { path: String, source: std::io::Error },
    #[error("unknown key `{key}` in {origin}{}", suggestion(.nearest))]
    UnknownKey { key: String, origin: String, nearest: Option<String> },
    #[error("`{key}` in {origin} is {problem}")]
    BadValue { key: String, origin: String, problem: String },
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Shape(#[from] Box<figment::Error>),
}

fn suggestion(nearest: &Option<String>) -> String {
    match nearest {
        Some(key) => format!("; the nearest known key is `{key}`"),
        None => "; `postrider config schema` lists the known ones".to_owned(),
    }
}

thread_local! {
    /// Whether defaults are being written for the docs: those are in the code for everyone to read.
    static DEFAULTS: Cell<bool> = const { Cell::new(false) };
}

/// A value that must not be printed. `Debug` and `Serialize` show `********`.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value itself, to hand to a client library.
    pub fn expose(&self) -> &str {
        &self.0
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("********")
    }
}

impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let shown = if self.0.is_empty() || DEFAULTS.get() { &self.0 } else { "********" };
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

#[cfg(test)]
mod tests;
