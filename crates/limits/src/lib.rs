//! Limits: budgets of memory ([`memory`]), bounds on rows and keys in Postgres and Redis
//! ([`bound`]), and an even rate ([`pace`]).

pub mod bound;
pub mod memory;
pub mod pace;
