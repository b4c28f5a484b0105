//! Limits: budgets of memory, bounds on what grows in a store, and rates.

pub mod bound;
pub mod memory;
pub mod pace;
