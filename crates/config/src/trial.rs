//! Reasons why settings that are tested before they are put into use do not work.

use std::fmt;

/// Reason why settings do not work. The text is a sentence for the operator on call, without
/// credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The settings are invalid, or a server has answered and rejects them.
    Refused(String),
    /// No server answers, or the one that answers cannot work at the moment.
    Unreachable(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(text) | Self::Unreachable(text) => f.write_str(text),
        }
    }
}
