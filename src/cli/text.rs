//! What commands print.

use std::io::{self, IsTerminal, Write};

use clap::{Args, ValueEnum};
use serde::Serialize;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Json,
}

#[derive(Args)]
pub struct Output {
    /// How to print
    #[arg(long = "output", value_enum, default_value_t = Format::Table)]
    format: Format,
}

impl Output {
    /// Prints what was found, for programs or as a table.
    pub fn print<T: Serialize>(&self, found: &T, table: impl FnOnce(&T) -> String) -> Result<(), String> {
        print(&match self.format {
            Format::Json => json(found)?,
            Format::Table => table(found),
        })
    }
}

/// Prints to stdout; a reader that has seen enough, such as `head`, is no error.
pub fn print(text: &str) -> Result<(), String> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(format!("cannot print: {error}")),
        _ => Ok(()),
    }
}

pub fn json(value: &impl Serialize) -> Result<String, String> {
    serde_json::to_string_pretty(value).map(|text| text + "\n").map_err(|error| error.to_string())
}

/// Text of others, for a terminal: without what would steer it.
pub fn tame(text: &str) -> String {
    text.chars().map(|char| if char.is_control() { '\u{fffd}' } else { char }).collect()
}

/// Rows under each other, the head among them. The last column is cut only where a person looks at it.
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
