//! Configuration, by increasing precedence: defaults in code, `postrider.yaml`, `POSTRIDER_*`
//! variables, flags.
//!
//! The source of every value is known. An unknown key is an error that names the nearest known key.
//! Secrets can be read from mounted files: through `…_file` keys, and in maps through `{file: …}`.

mod keys;
mod layers;
mod render;
mod secret;
pub mod trial;
mod url;

pub use keys::{Key, Kind, known_keys, nearest};
pub use layers::{Loaded, Overrides, ValueError, load};
pub use render::{Shown, lines, markdown_table, schema, show, shown};
pub use secret::{Properties, Secret, Secrets, is_telling};
pub use url::{SecretUrl, masked};

/// Errors of a configuration; every message names the key and the source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {path}: {source}")]
    Unreadable { path: String, source: std::io::Error },
    #[error("unknown key `{key}` in {origin}{}", suggestion(.nearest, "; `postrider config schema` lists the known keys"))]
    UnknownKey { key: String, origin: String, nearest: Option<String> },
    #[error("`{key}` in {origin} is {problem}")]
    BadValue {
        key: String,
        origin: String,
        #[source]
        problem: ValueError,
    },
    #[error("{path} is not valid YAML: {source}")]
    NotYaml { path: String, source: Box<figment::Error> },
    #[error(transparent)]
    Shape(#[from] Box<figment::Error>),
}

fn suggestion(nearest: &Option<String>, otherwise: &str) -> String {
    nearest.as_ref().map_or(otherwise.to_owned(), |key| format!("; the nearest known key is `{key}`"))
}

#[cfg(test)]
mod tests;
