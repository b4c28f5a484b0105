//! Writes and checks the tables of the docs that are generated from the code.

use std::{fs, io};

use postrider_config as config;
use postrider_http::{Code, code};

use super::text;
use crate::roles::Settings;

/// Every error code that an answer can have.
const CODES: &[&[Code]] = &[
    Code::ALL,
    postrider_auth::CODES,
    postrider_rate_limit::CODES,
    postrider_gateway::codes::ALL,
    postrider_kv::codes::ALL,
    postrider_messages::codes::ALL,
    postrider_feed::codes::ALL,
    postrider_outbox_backlog::codes::ALL,
    postrider_dlq::codes::ALL,
];

/// The reason why the tables cannot be written or are not current.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{file}: {source}")]
    File { file: &'static str, source: io::Error },
    #[error("{file} lacks the marker `{marker}`")]
    NoMarker { file: &'static str, marker: &'static str },
    #[error("stale: {}; run `make docs`", .0.join(", "))]
    Stale(Vec<&'static str>),
    #[error(transparent)]
    Print(#[from] text::Error),
}

/// Returns each generated part: its file, its marker and its content.
fn parts() -> [(&'static str, &'static str, String); 2] {
    [
        ("docs/configuration.md", "configuration", config::markdown_table::<Settings>()),
        ("docs/errors.md", "errors", code::markdown_table(CODES)),
    ]
}

/// Replaces the text between the markers. With `check`, fails if that would change a file.
pub fn write_or_check(check: bool) -> Result<(), Error> {
    let mut stale = Vec::new();
    for (file, marker, table) in parts() {
        let text = fs::read_to_string(file).map_err(|source| Error::File { file, source })?;
        let fresh = replace(&text, marker, &table).ok_or(Error::NoMarker { file, marker })?;
        if fresh == text {
            continue;
        }
        stale.push(file);
        if !check {
            fs::write(file, fresh).map_err(|source| Error::File { file, source })?;
        }
    }
    match (check, stale.is_empty()) {
        (_, true) => Ok(()),
        (true, false) => Err(Error::Stale(stale)),
        (false, false) => {
            text::print(&format!("wrote {}\n", stale.join(", ")))?;
            Ok(())
        }
    }
}

fn replace(text: &str, marker: &str, table: &str) -> Option<String> {
    let (begin, end) = (format!("<!-- begin generated: {marker} -->\n"), format!("<!-- end generated: {marker} -->"));
    let (head, rest) = text.split_once(&begin)?;
    let (_, tail) = rest.split_once(&end)?;
    Some(format!("{head}{begin}{table}{end}{tail}"))
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, path::Path};

    use super::*;

    #[test]
    fn every_crate_with_error_codes_is_listed() {
        let crates = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("crates")).unwrap();
        let own = crates.filter(|one| one.as_ref().unwrap().path().join("src/codes.rs").exists());
        // The general codes are in a crate as well, under another name.
        assert_eq!(CODES.len(), own.count() + 1);
    }

    #[test]
    fn no_two_error_codes_have_the_same_word() {
        let mut words = HashSet::new();
        for code in CODES.concat() {
            assert!(words.insert(code.word), "{} is defined twice", code.word);
        }
    }
}
