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

pub use keys::{Key, Kind, known_keys};
pub use layers::{Loaded, Overrides, load};
pub use render::{markdown_table, schema, show};
pub use secret::{Properties, Secret, Secrets, is_telling};
pub use url::{SecretUrl, masked};

/// Errors of a configuration; every message names the key and the source.
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
        None => "; `postrider config schema` lists the known keys".to_owned(),
    }
}

#[cfg(test)]
mod tests;
