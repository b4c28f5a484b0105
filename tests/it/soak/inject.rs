//! Deliberate changes of the evidence, while it is collected or afterwards. The judge must find
//! each of them.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::{
    check,
    ledger::Evidence,
    tamper::{self, Tamper},
};
use crate::harness::sessions::Trick;

/// The number of the event, among those of its kind, that is tampered with.
const WARM_UP: usize = 20;

/// A change that is made once, between the product and a sink, or between a sender and the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inject {
    /// A delivery is answered with 200, but not recorded.
    Drop,
    /// A push is sent twice, but recorded once.
    Duplicate,
    /// Two deliveries of a key change places.
    Swap,
    /// A stored push is recorded as refused.
    Leak,
    /// A change of the messages that a device receives.
    Messages(Trick),
}

impl Inject {
    pub fn parse(word: &str) -> Self {
        match word {
            "drop" => Self::Drop,
            "duplicate" => Self::Duplicate,
            "swap" => Self::Swap,
            "leak" => Self::Leak,
            "drop-message" => Self::Messages(Trick::Drop),
            "duplicate-message" => Self::Messages(Trick::Duplicate),
            "swap-messages" => Self::Messages(Trick::Swap),
            "leak-message" => Self::Messages(Trick::Leak),
            _ => panic!(
                "SOAK_INJECT must be drop, duplicate, swap or leak, or drop-message, duplicate-message, swap-messages \
                 or leak-message (got {word})"
            ),
        }
    }

    /// The rule that the change violates.
    pub fn breaks(self) -> &'static str {
        match self {
            Self::Drop => check::DELIVERED,
            Self::Duplicate => check::REPEATED,
            Self::Swap => check::DELIVERY_ORDER,
            Self::Leak => check::LEAKED,
            Self::Messages(Trick::Leak) => check::FOREIGN,
            Self::Messages(_) => check::MAILBOX,
        }
    }

    /// The change of messages, and the number of messages before it.
    pub fn trick(self) -> Option<(Trick, usize)> {
        let Self::Messages(trick) = self else { return None };
        Some((trick, WARM_UP))
    }
}

/// Decides when to tamper.
#[derive(Clone, Default)]
pub struct Injection {
    what: Option<Inject>,
    left: Arc<AtomicUsize>,
}

impl Injection {
    pub fn new(what: Option<Inject>) -> Self {
        Self { what, left: Arc::new(AtomicUsize::new(WARM_UP)) }
    }

    /// Returns whether to tamper with this event. Call it once for each event of the kind.
    pub fn now(&self, what: Inject) -> bool {
        self.what == Some(what) && self.left.fetch_sub(1, Ordering::Relaxed) == 1
    }
}

/// Tampers with a copy in each way; returns the ways that the judge did not notice. Leaves out
/// rules that are already violated.
pub fn unnoticed(evidence: &Evidence) -> Vec<&'static str> {
    let violated: BTreeSet<&str> = check::in_the_end(evidence).iter().map(|finding| finding.rule).collect();
    let blind = |(what, rule, tamper): (&'static str, &'static str, Tamper)| {
        let mut copy = evidence.clone();
        tamper(&mut copy);
        let found = check::in_the_end(&copy);
        (!found.iter().any(|finding| finding.rule == rule)).then_some(what)
    };
    tamper::all().filter(|(_, rule, _)| !violated.contains(rule)).filter_map(blind).collect()
}
