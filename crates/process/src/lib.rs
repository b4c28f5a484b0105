//! The life of a process: signals, owned tasks and their end ([`drain`]), its replacement by a new
//! program in place ([`replace`]), and containment of a library's panics ([`panic`]).

pub mod drain;
pub mod panic;
pub mod replace;
