//! The interface by which a watch over files has their content tried.

use std::collections::BTreeMap;

use super::Lease;
use crate::platform::redis::Redis;

/// The order in which processes of a role restart.
pub struct Order {
    pub lease: Lease,
    /// Where the lease is kept.
    pub redis: Redis,
}

/// The outcome of an attempt.
pub enum Verdict {
    /// Everything works. Without an order, processes wait at random.
    Works(Option<Order>),
    /// These parts do not work, each with a sentence, and what is in use does.
    Refused(BTreeMap<&'static str, String>),
    /// Servers are away, for what is in use as well.
    Unreachable(String),
}

/// Tries what a process would start with now.
pub trait Trial: Clone + Sync {
    fn attempt(&self) -> impl Future<Output = Verdict> + Send;

    /// Returns whether the process serves.
    fn is_ready(&self) -> bool;

    /// Resolves when the process serves, and load balancers have had the time to notice.
    fn noticed(&self) -> impl Future<Output = ()> + Send;

    /// Gives a lease back that the process took before it replaced itself. Returns whether it held one.
    fn give_back(&self) -> impl Future<Output = Result<bool, String>> + Send;
}
