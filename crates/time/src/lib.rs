//! Wall-clock time in the formats that are sent and stored, and the backoff between attempts.

pub mod backoff;
pub mod clock;
