//! The life of a process: its tasks and their end, its replacement by a new one, and panics that
//! libraries are expected to raise.

pub mod drain;
pub mod panic;
pub mod replace;
