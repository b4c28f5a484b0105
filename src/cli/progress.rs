//! Shows what a command is doing and how far it is: one line on stderr, if stderr is a terminal.

use postrider_telemetry::StatusLine;

/// The line. Drop erases it.
pub struct Progress(Option<StatusLine>);

impl Progress {
    pub fn new() -> Self {
        Self(StatusLine::on_terminal())
    }

    /// Replaces the text of the line.
    pub fn show(&self, text: &str) {
        if let Some(line) = &self.0 {
            line.set(text);
        }
    }

    /// Erases the line until the next text, to print something else.
    pub fn hide(&self) {
        self.show("");
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.hide();
    }
}
