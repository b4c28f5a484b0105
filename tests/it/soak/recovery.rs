//! The bounds of recovery times after faults, and their rule.
//!
//! The recovery time counts from the end of the fault to the first success after it, separately for
//! each service. Faults that overlap count as one. A fault that begins while service is not yet
//! back, and that breaks the same service, adds its own time.

use std::{collections::BTreeMap, fmt};

use super::ledger::{Evidence, Fault, Topic};

/// A client that sent a request just before the end of the fault waits for at most 8 s, and then
/// pauses for at most half a second.
const CLIENT_MS: u64 = 8_000 + 500;
/// Margin for a machine whose other core is busy.
const MARGIN_MS: u64 = 3_000;
/// A group considers a silent member dead after `group.consumer.session.timeout.ms`. A live member
/// has 5 s to release partitions. Three heartbeats of 1 s report the change, the release and the
/// assignment.
const GROUP_MS: u64 = 6_000 + 5_000 + 3 * 1_000;
/// A broker is fenced for `broker.session.timeout.ms`. Clients reconnect after
/// `reconnect.backoff.max.ms`. The producer probes the broker every 3 s, and waits 2 s for the
/// answer.
const BROKER_MS: u64 = 3_000 + 1_000 + 3_000 + 2_000;
/// `redis.response_timeout_ms`, `redis.connect_timeout_ms`, and the longest pause before another
/// attempt.
const REDIS_MS: u64 = 2_000 + 1_000 + 1_000;
/// Time for one query, `postgres.acquire_timeout_ms`, and the longest pause before a projection
/// retries.
const POSTGRES_MS: u64 = 5_000 + 3_000 + 2_000;
/// `timeout_ms` of the relay's route, and `max_retry_delay_ms`.
const TARGET_MS: u64 = 3_000 + 2_000;
/// A device closes a silent connection after 3 s.
const DEVICE_MS: u64 = 3_000;
/// Time until a silent open connection to Redis or Postgres is replaced.
const SILENCE_MS: u64 = 5_000;
/// Time until a Kafka client with a silent open connection is replaced.
const KAFKA_SILENCE_MS: u64 = 10_000;

/// A service whose recovery is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Service {
    Push,
    Produce,
    Comment,
    Pull,
    Delivery,
    Message,
    Frame,
    Post,
    Feed,
}

use Service::{Comment, Delivery, Feed, Frame, Message, Post, Produce, Pull, Push};

impl Service {
    pub const ALL: [Self; 9] = [Push, Produce, Comment, Pull, Delivery, Message, Frame, Post, Feed];

    /// Returns whether a consumer provides the service, rather than a response of the API.
    fn is_carried(self) -> bool {
        matches!(self, Delivery | Frame)
    }
}

impl fmt::Display for Service {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.pad(&format!("{self:?}").to_lowercase())
    }
}

/// The services that a kind of fault breaks, and the bounds of their recovery times.
pub struct Bound {
    kind: &'static str,
    breaks: &'static [Service],
    /// Bound of services that respond to requests.
    answered_ms: u64,
    /// Bound of services that a consumer provides.
    carried_ms: u64,
}

const ANSWERS: &[Service] = &[Push, Produce, Comment, Pull, Message, Frame, Post, Feed];
const PROJECTED: &[Service] = &[Pull, Frame];
const KAFKA: &[Service] = &[Push, Produce, Comment, Pull, Delivery, Message, Frame];
const REDIS: &[Service] = &[Pull, Frame, Feed];
const POSTGRES: &[Service] = &[Frame, Post, Feed];

/// The bounds, which docs/soak.md lists too.
pub const BOUNDS: [Bound; 25] = {
    let api = CLIENT_MS + MARGIN_MS;
    let (group, pull) = (GROUP_MS + MARGIN_MS, GROUP_MS + CLIENT_MS + MARGIN_MS);
    let broker = BROKER_MS + CLIENT_MS + MARGIN_MS;
    let (broker_group, redis) = (BROKER_MS + GROUP_MS + MARGIN_MS, REDIS_MS + CLIENT_MS + MARGIN_MS);
    let redis_frames = REDIS_MS + DEVICE_MS + MARGIN_MS;
    let (postgres, postgres_frames) = (POSTGRES_MS + CLIENT_MS + MARGIN_MS, POSTGRES_MS + DEVICE_MS + MARGIN_MS);
    [
        bound("api killed", ANSWERS, api, api),
        bound("api frozen", ANSWERS, api, api),
        bound("api restarted", ANSWERS, api, api),
        bound("processor killed", PROJECTED, pull, group),
        bound("processor frozen", PROJECTED, pull, group),
        bound("processor restarted", PROJECTED, pull, group),
        bound("relay killed", &[Delivery], group, group),
        bound("relay frozen", &[Delivery], group, group),
        bound("relay restarted", &[Delivery], group, group),
        bound("kafka killed", KAFKA, broker, broker_group),
        bound("kafka restarted", KAFKA, broker, broker_group),
        bound("kafka frozen", KAFKA, broker, broker_group),
        bound("kafka answers lost", KAFKA, broker, broker_group),
        bound("kafka black hole", KAFKA, KAFKA_SILENCE_MS + broker, KAFKA_SILENCE_MS + broker_group),
        bound("redis emptied", REDIS, redis, redis_frames),
        bound("redis killed", REDIS, redis, redis_frames),
        bound("redis frozen", REDIS, redis, redis_frames),
        bound("redis answers lost", REDIS, redis, redis_frames),
        bound("redis black hole", REDIS, SILENCE_MS + redis, SILENCE_MS + redis_frames),
        bound("postgres killed", POSTGRES, postgres, postgres_frames),
        bound("postgres restarted", POSTGRES, postgres, postgres_frames),
        bound("postgres frozen", POSTGRES, postgres, postgres_frames),
        bound("postgres answers lost", POSTGRES, postgres, postgres_frames),
        bound("postgres black hole", POSTGRES, SILENCE_MS + postgres, SILENCE_MS + postgres_frames),
        bound("target fails", &[Delivery], TARGET_MS + MARGIN_MS, TARGET_MS + MARGIN_MS),
    ]
};

const fn bound(kind: &'static str, breaks: &'static [Service], answered_ms: u64, carried_ms: u64) -> Bound {
    Bound { kind, breaks, answered_ms, carried_ms }
}

/// Returns the bound of a service after a kind of fault, and whether the fault breaks the service.
/// A service that it does not break has the bound of a client.
pub fn bound_ms(kind: &str, service: Service) -> (u64, bool) {
    let bound = BOUNDS.iter().find(|bound| bound.kind == kind).filter(|bound| bound.breaks.contains(&service));
    match bound {
        Some(bound) if service.is_carried() => (bound.carried_ms, true),
        Some(bound) => (bound.answered_ms, true),
        None => (CLIENT_MS + MARGIN_MS, false),
    }
}

/// Returns the times of each service's successes, in order.
pub fn successes(evidence: &Evidence) -> BTreeMap<Service, Vec<u64>> {
    let done = |topic: Topic| {
        let writes = evidence.writes.iter().filter(move |write| write.kind.topic() == topic);
        writes.filter_map(|write| write.done_ms).collect::<Vec<u64>>()
    };
    let taken = evidence.deliveries.iter().filter(|delivery| delivery.taken).map(|delivery| delivery.at_ms);
    let frames = evidence.sessions.iter().flat_map(|session| &session.got).map(|got| got.at_ms);
    let mut successes = BTreeMap::from([
        (Push, done(Topic::Messages)),
        (Produce, done(Topic::Orders)),
        (Comment, done(Topic::Comments)),
        (Pull, evidence.sights.iter().map(|sight| sight.at_ms).collect()),
        (Delivery, taken.collect()),
        (Message, done(Topic::Chat)),
        (Frame, frames.collect()),
        (Post, done(Topic::Posts)),
        (Feed, evidence.pages.iter().map(|page| page.at_ms).collect()),
    ]);
    successes.values_mut().for_each(|times| times.sort_unstable());
    successes
}

/// The recovery of one service after a fault and the faults that overlap it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovery {
    pub kind: &'static str,
    pub service: Service,
    pub ended_ms: u64,
    pub bound_ms: u64,
    /// The time at which the service must be back; other faults in between postpone it.
    pub due_ms: u64,
    pub back_ms: Option<u64>,
}

/// Computes the recovery of each service after each fault.
pub fn recoveries(evidence: &Evidence) -> Vec<Recovery> {
    let mut faults: Vec<&Fault> = evidence.faults.iter().collect();
    faults.sort_by_key(|fault| fault.from_ms);
    let of_service = |(service, times): (Service, Vec<u64>)| {
        faults.iter().map(|fault| recovery(fault, &faults, service, &times)).collect::<Vec<_>>()
    };
    successes(evidence).into_iter().flat_map(of_service).collect()
}

/// Computes one recovery. `faults` are all faults, ordered by start, and `times` the service's
/// successes.
fn recovery(fault: &Fault, faults: &[&Fault], service: Service, times: &[u64]) -> Recovery {
    let back_after = |at_ms: u64| times.get(times.partition_point(|at| *at <= at_ms)).copied();
    let (bound_ms, _) = bound_ms(fault.kind, service);
    let (mut ended_ms, mut due_ms) = (fault.to_ms, fault.to_ms + bound_ms);
    for other in faults {
        let (other_bound_ms, breaks) = self::bound_ms(other.kind, service);
        let other_due_ms = other.to_ms + other_bound_ms;
        if !breaks {
            continue;
        }
        if other.to_ms < fault.from_ms {
            // The bound of an earlier fault may not have passed when this fault began.
            if back_after(other.to_ms).is_none_or(|back_ms| back_ms >= fault.from_ms) {
                due_ms = due_ms.max(other_due_ms);
            }
            continue;
        }
        // A fault that begins while the service is not yet back adds its own time.
        let in_between = other.from_ms <= due_ms && back_after(ended_ms).is_none_or(|back_ms| back_ms >= other.from_ms);
        if other.from_ms <= ended_ms || in_between {
            ended_ms = ended_ms.max(other.to_ms);
            due_ms = due_ms.max(other_due_ms);
        }
    }
    Recovery { kind: fault.kind, service, ended_ms, bound_ms, due_ms, back_ms: back_after(ended_ms) }
}

/// Returns the services without a success after `since_ms`. During the run the evidence has no
/// sessions, so `frame_ms` is the time of the last message at a device.
pub fn missing(evidence: &Evidence, frame_ms: Option<u64>, since_ms: u64) -> Vec<Service> {
    let last = |(service, times): (Service, Vec<u64>)| {
        let last_ms = if service == Frame { frame_ms } else { times.last().copied() };
        last_ms.is_none_or(|last_ms| last_ms <= since_ms).then_some(service)
    };
    successes(evidence).into_iter().filter_map(last).collect()
}

/// Returns the largest bound of any service after a kind of fault.
pub fn longest_ms(kind: &str) -> u64 {
    Service::ALL.into_iter().map(|service| bound_ms(kind, service).0).max().unwrap_or(0)
}

/// Finds services that were not back in time. Leaves out those that were due after the end of the
/// load.
pub fn late(evidence: &Evidence) -> Vec<String> {
    let until_ms = evidence.load_ended_ms.unwrap_or(u64::MAX);
    let late = |recovery: &Recovery| match recovery.back_ms {
        Some(back_ms) => back_ms > recovery.due_ms,
        None => recovery.due_ms < until_ms,
    };
    let say = |recovery: Recovery| {
        let Recovery { kind, service, ended_ms, bound_ms, due_ms, back_ms } = recovery;
        let back = back_ms.map_or("was not back".to_owned(), |back_ms| format!("was back at {back_ms} ms"));
        format!(
            "{service} {back} after \"{kind}\", which ended at {ended_ms} ms: due at {due_ms} ms (bound {bound_ms} ms)"
        )
    };
    recoveries(evidence).into_iter().filter(late).map(say).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::events::Page, *};

    fn evidence(faults: &[(&'static str, u64, u64)], pages: &[u64]) -> Evidence {
        let fault = |(kind, from_ms, to_ms): &(&'static str, u64, u64)| Fault {
            kind,
            what: String::new(),
            from_ms: *from_ms,
            to_ms: *to_ms,
        };
        let page = |at_ms: &u64| Page { reader: "u".into(), asked_ms: *at_ms, at_ms: *at_ms, posts: Vec::new() };
        Evidence {
            faults: faults.iter().map(fault).collect(),
            pages: pages.iter().map(page).collect(),
            load_ended_ms: Some(200_000),
            ..Evidence::default()
        }
    }

    fn late_feed(faults: &[(&'static str, u64, u64)], pages: &[u64]) -> usize {
        late(&evidence(faults, pages)).iter().filter(|what| what.starts_with("feed")).count()
    }

    #[test]
    fn service_is_due_a_bound_after_the_end_and_other_faults_count_only_where_they_break_it() {
        const POSTGRES: (&str, u64, u64) = ("postgres killed", 10_000, 12_000);
        let (bound, breaks) = bound_ms("postgres killed", Feed);
        assert!(breaks);
        assert_eq!(late_feed(&[POSTGRES], &[12_000 + bound]), 0);
        assert_eq!(late_feed(&[POSTGRES], &[12_000, 12_001 + bound]), 1, "a success before the end does not count");
        assert_eq!(late_feed(&[POSTGRES], &[]), 1);
        // A second fault of the same service during the recovery.
        let again = ("postgres frozen", 20_000, 25_000);
        assert_eq!(late_feed(&[POSTGRES, again], &[25_000 + bound]), 0);
        assert_eq!(late_feed(&[POSTGRES, again], &[25_001 + bound]), 2);
        let other = ("relay frozen", 20_000, 25_000);
        assert_eq!(late_feed(&[POSTGRES, other], &[25_000 + bound]), 2, "a frozen relay does not break feeds");
        // The service was back before the second fault.
        assert_eq!(late_feed(&[POSTGRES, again], &[15_000, 25_001 + bound]), 1);
    }

    #[test]
    fn every_kind_of_fault_has_a_bound() {
        let kinds: Vec<&str> = BOUNDS.iter().map(|bound| bound.kind).collect();
        assert!(super::super::faults::KINDS.iter().all(|kind| kinds.contains(kind)));
        assert_eq!(kinds.len(), super::super::faults::KINDS.len());
    }

    #[test]
    fn the_bounds_are_those_of_the_table_in_the_docs() {
        let docs = include_str!("../../../docs/soak.md");
        let split = |bound: &Bound| bound.kind.split_once(' ').unwrap();
        let same = |one: &Bound, other: &Bound| {
            let times = |bound: &Bound| (bound.answered_ms, bound.carried_ms);
            split(one).0 == split(other).0 && times(one) == times(other)
        };
        for bounds in BOUNDS.chunk_by(same) {
            let hows: Vec<&str> = bounds.iter().map(|bound| split(bound).1).collect();
            let seconds = |ms: u64| ms as f64 / 1e3;
            let (part, hows) = (split(&bounds[0]).0, hows.join(", "));
            let (answered, carried) = (seconds(bounds[0].answered_ms), seconds(bounds[0].carried_ms));
            let row = format!("| {part} {hows} | {answered} s | {carried} s |");
            assert!(docs.contains(&row), "docs/soak.md lacks: {row}");
        }
    }
}
