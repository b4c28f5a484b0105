//! One line at the bottom of a terminal that is written over and over, and log lines above it.

use std::{
    io::{self, IsTerminal, Write},
    sync::{Mutex, PoisonError},
};

/// What the line shows now; empty while there is none.
static SHOWN: Mutex<String> = Mutex::new(String::new());

/// Back to the beginning of the line, and nothing after it.
const CLEAR: &[u8] = b"\r\x1b[2K";

/// Owns the line; it ends with this.
pub struct StatusLine(());

impl StatusLine {
    /// `None` when nobody watches. On standard error, where the log goes as well.
    pub fn on_terminal() -> Option<Self> {
        io::stderr().is_terminal().then_some(Self(()))
    }

    pub fn set(&self, text: &str) {
        let mut shown = SHOWN.lock().unwrap_or_else(PoisonError::into_inner);
        text.clone_into(&mut shown);
        let _ = io::stderr().write_all(&[CLEAR, text.as_bytes()].concat());
    }
}

impl Drop for StatusLine {
    fn drop(&mut self) {
        let mut shown = SHOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::take(&mut *shown).is_empty() {
            let _ = io::stderr().write_all(b"\n");
        }
    }
}

/// Where log lines go: above the line where there is one.
#[derive(Clone, Copy)]
pub(super) struct AboveStatus;

impl Write for AboveStatus {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let shown = SHOWN.lock().unwrap_or_else(PoisonError::into_inner);
        match shown.is_empty() {
            true => io::stderr().write_all(bytes)?,
            false => io::stderr().write_all(&[CLEAR, bytes, shown.as_bytes()].concat())?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
