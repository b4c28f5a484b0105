//! Interface through which a watch over files has their content tested.

use std::collections::BTreeMap;

use postrider_redis::Redis;
use redis::RedisError;

use super::Lease;

/// Order in which the processes of a role restart.
pub struct Order {
    pub lease: Lease,
    /// Server that keeps the lease.
    pub redis: Redis,
}

/// Outcome of an attempt.
pub enum Verdict {
    /// Everything works. Without an order, the process waits for a random time.
    Works(Option<Order>),
    /// These parts do not work, each with a sentence that says why; the configuration in use works.
    Refused(BTreeMap<&'static str, String>),
    /// Servers do not answer, with the configuration in use either.
    Unreachable(String),
}

/// Tests the configuration that the process would start with now.
pub trait Trial: Clone + Sync {
    fn attempt(&self) -> impl Future<Output = Verdict> + Send;

    /// Returns whether the process is ready.
    fn is_ready(&self) -> bool;

    /// Waits until the process is ready, and load balancers have had the time to notice.
    fn noticed(&self) -> impl Future<Output = ()> + Send;

    /// Releases a lease that the process took before it replaced itself. Returns whether it held
    /// one.
    fn give_back(&self) -> impl Future<Output = Result<bool, RedisError>> + Send;
}
