//! Faults on purpose in what is judged, while it is gathered or afterwards: each must be found, or the judge is blind.

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

/// Events of its kind before one of them is tampered with.
const WARM_UP: usize = 20;

/// What is done, once, between the product and a sink, or between a sender and the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inject {
    /// A delivery does not reach the target, and the product believes that it does.
    Drop,
    /// A push is sent twice, and the sender knows of one.
    Duplicate,
    /// Two deliveries of a key change places.
    Swap,
    /// The sender of a stored push is told that it was refused.
    Leak,
    /// The same to what a device gets of its messages.
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
            _ => panic!("SOAK_INJECT is drop, duplicate, swap, leak, or one of these of messages, not {word}"),
        }
    }

    /// The rule that must be broken by it.
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

    /// What is done to messages, and after how many.
    pub fn trick(self) -> Option<(Trick, usize)> {
        let Self::Messages(trick) = self else { return None };
        Some((trick, WARM_UP))
    }
}

/// Says when to tamper.
#[derive(Clone, Default)]
pub struct Injection {
    what: Option<Inject>,
    left: Arc<AtomicUsize>,
}

impl Injection {
    pub fn new(what: Option<Inject>) -> Self {
        Self { what, left: Arc::new(AtomicUsize::new(WARM_UP)) }
    }

    /// Whether this event is the one; asked once for each event that it could be.
    pub fn now(&self, what: Inject) -> bool {
        self.what == Some(what) && self.left.fetch_sub(1, Ordering::Relaxed) == 1
    }
}

/// Tampers with a copy in each of the ways; returns those that nobody noticed. A rule that is violated already cannot
/// be tried.
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
