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
#[command(next_help_heading = "Output")]
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
        })?;
        Ok(())
    }
}

/// State of stdout after printing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stdout {
    Open,
    /// The reader has closed the pipe, as `head` does. That is not an error: a command that would
    /// print for ever ends.
    Closed,
}

/// Prints to stdout.
pub fn print(text: &str) -> Result<Stdout, Error> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(Stdout::Open),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Stdout::Closed),
        Err(error) => Err(Error::Stdout(error)),
    }
}

/// Prints a line for the user to stderr, where it does not disturb what a script reads. A closed
/// stderr is not an error.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
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
