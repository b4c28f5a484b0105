//! Output formats and helpers for text that commands print.

use std::io::{self, IsTerminal, Write};

use clap::{Args, ValueEnum};
use serde::Serialize;

/// The reason why a result could not be printed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot print: {0}")]
    Stdout(#[source] io::Error),
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Json,
}

#[derive(Args)]
pub struct Output {
    /// Output format
    #[arg(long = "output", value_enum, default_value_t = Format::Table)]
    format: Format,
}

impl Output {
    /// Prints `found` as JSON or as a table, depending on `--output`.
    pub fn print<T: Serialize>(&self, found: &T, table: impl FnOnce(&T) -> String) -> Result<(), Error> {
        print(&match self.format {
            Format::Json => serde_json::to_string_pretty(found)? + "\n",
            Format::Table => table(found),
        })
    }
}

/// Prints to stdout. A closed pipe, such as that of `head`, is not an error.
fn print(text: &str) -> Result<(), Error> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Error::Stdout(error)),
        _ => Ok(()),
    }
}

/// Replaces control characters in foreign text, so that it cannot steer the terminal.
pub fn tame(text: &str) -> String {
    text.chars().map(|char| if char.is_control() { '\u{fffd}' } else { char }).collect()
}

/// Aligns rows, the heading among them, into columns. On a terminal the last column is cut to 80
/// characters.
pub fn columns<const N: usize>(rows: Vec<[String; N]>) -> String {
    let rows: Vec<[String; N]> = rows.into_iter().map(|row| row.map(|cell| tame(&cell))).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let longest = if io::stdout().is_terminal() { 80 } else { usize::MAX };
    let mut text = String::new();
    for row in &rows {
        for (cell, width) in row[..N - 1].iter().zip(&widths) {
            text.push_str(&format!("{cell:width$}  "));
        }
        text.extend(row[N - 1].chars().take(longest));
        text.push('\n');
    }
    text
}
