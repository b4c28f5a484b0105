//! Reasons why settings that are tested before they are put into use do not work.

/// Reason why settings do not work. The text is a sentence for the operator on call, without
/// credentials.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The settings are invalid, or a server has answered and rejects them.
    #[error("{0}")]
    Refused(String),
    /// No server answers, or the one that answers cannot work at the moment.
    #[error("{0}")]
    Unreachable(String),
}
