//! A status line at the bottom of a terminal, overwritten in place, with log lines above it.

use std::io::{self, IsTerminal, Write};

use parking_lot::Mutex;

/// Text of the status line; empty while there is none.
static SHOWN: Mutex<String> = Mutex::new(String::new());

/// Moves the cursor to the beginning of the line and erases the line.
const CLEAR: &[u8] = b"\r\x1b[2K";

/// Owner of the status line; dropping it ends the line.
pub struct StatusLine(());

impl StatusLine {
    /// Returns `None` if standard error is not a terminal. The line goes to standard error, as the
    /// log does.
    pub fn on_terminal() -> Option<Self> {
        io::stderr().is_terminal().then_some(Self(()))
    }

    pub fn set(&self, text: &str) {
        let mut shown = SHOWN.lock();
        text.clone_into(&mut shown);
        let _ = io::stderr().write_all(&[CLEAR, text.as_bytes()].concat());
    }
}

impl Drop for StatusLine {
    fn drop(&mut self) {
        let mut shown = SHOWN.lock();
        if !std::mem::take(&mut *shown).is_empty() {
            let _ = io::stderr().write_all(b"\n");
        }
    }
}

/// Writer of log lines. It writes above the status line if there is one.
#[derive(Clone, Copy)]
pub(super) struct AboveStatus;

impl Write for AboveStatus {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let shown = SHOWN.lock();
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
