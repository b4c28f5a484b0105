//! Decides how to continue with the view of a newly assigned partition.

use postrider_kafka::consumer::Assignment;

use super::entry::Marker;

/// Maximum age of a view that is caught up in place, in seconds: tombstones since then are still in
/// the log.
const CATCH_UP_S: i64 = 3_600;

/// Age from which a view that lacks records is rebuilt, in seconds, because their tombstones may no
/// longer be in the log: half of `delete.retention.ms`, which leaves time to read them.
const STALE_S: i64 = 12 * 3_600;

/// How to continue, according to the marker and the log.
#[derive(Debug, PartialEq, Eq)]
pub enum Plan {
    /// Continue from the view's current position.
    Continue,
    /// The view lacks a few records: mark it incomplete and read from its marker.
    CatchUp { target: i64 },
    /// Drop the view and read the log again.
    Rebuild { from: i64, target: i64 },
    /// The log ends before an offset that was applied, so it is a different log.
    Refuse { applied: i64 },
}

/// Returns the plan. `now_s` is the time in seconds since the Unix epoch.
pub fn plan(marker: Option<Marker>, assignment: &Assignment, now_s: i64) -> Plan {
    let Assignment { committed, low, high, .. } = *assignment;
    let applied = marker.map_or(0, |marker| marker.next).max(committed.unwrap_or(0));
    if applied > high {
        return Plan::Refuse { applied };
    }
    let stale = |marker: Marker| now_s - marker.written_s >= STALE_S && (marker.next < high || !marker.is_complete());
    match marker {
        Some(marker) if marker.next < low || stale(marker) => Plan::Rebuild { from: low, target: high },
        Some(marker) if committed.is_none_or(|committed| marker.next >= committed) || !marker.is_complete() => {
            Plan::Continue
        }
        Some(marker) if now_s - marker.written_s < CATCH_UP_S => Plan::CatchUp { target: applied },
        _ => Plan::Rebuild { from: low, target: high },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assignment(committed: Option<i64>, low: i64, high: i64) -> Assignment {
        Assignment { partition: 0, committed, low, high }
    }

    fn live(next: i64) -> Option<Marker> {
        Some(Marker { next, written_s: 1_000, target: None })
    }

    #[test]
    fn a_view_at_or_ahead_of_the_commit_point_continues() {
        assert_eq!(plan(live(50), &assignment(Some(50), 0, 60), 1_001), Plan::Continue);
        assert_eq!(plan(live(55), &assignment(Some(50), 0, 60), 1_001), Plan::Continue);
        assert_eq!(plan(live(0), &assignment(None, 0, 0), 1_001), Plan::Continue);
    }

    #[test]
    fn a_view_without_its_marker_is_rebuilt() {
        assert_eq!(plan(None, &assignment(Some(50), 3, 60), 1_001), Plan::Rebuild { from: 3, target: 60 });
        assert_eq!(plan(None, &assignment(None, 0, 0), 1_001), Plan::Rebuild { from: 0, target: 0 });
    }

    #[test]
    fn a_view_behind_the_commit_point_catches_up_or_is_rebuilt() {
        assert_eq!(plan(live(40), &assignment(Some(50), 0, 60), 1_001), Plan::CatchUp { target: 50 });
        let later = 1_000 + CATCH_UP_S;
        assert_eq!(plan(live(40), &assignment(Some(50), 0, 60), later), Plan::Rebuild { from: 0, target: 60 });
        assert_eq!(plan(live(40), &assignment(Some(50), 45, 60), 1_001), Plan::Rebuild { from: 45, target: 60 });
    }

    #[test]
    fn a_log_that_ends_before_an_applied_offset_is_refused() {
        assert_eq!(plan(live(50), &assignment(Some(50), 0, 10), 1_001), Plan::Refuse { applied: 50 });
        assert_eq!(plan(None, &assignment(Some(50), 0, 10), 1_001), Plan::Refuse { applied: 50 });
    }

    #[test]
    fn an_interrupted_rebuild_continues() {
        let marker = Marker { next: 20, written_s: 0, target: Some(60) };
        assert_eq!(plan(Some(marker), &assignment(Some(50), 0, 60), STALE_S - 1), Plan::Continue);
    }

    #[test]
    fn a_view_that_is_behind_for_long_is_rebuilt_because_tombstones_may_be_missing() {
        let rebuild = Plan::Rebuild { from: 0, target: 60 };
        let interrupted = Marker { next: 20, written_s: 0, target: Some(60) };
        assert_eq!(plan(Some(interrupted), &assignment(Some(50), 0, 60), STALE_S), rebuild);
        assert_eq!(plan(live(50), &assignment(Some(50), 0, 60), 1_000 + STALE_S), rebuild);
        assert_eq!(
            plan(live(60), &assignment(Some(60), 0, 60), 1_000 + STALE_S),
            Plan::Continue,
            "the view is up to date"
        );
    }
}
