//! The states that the key-value view may show, derived from the topic alone.

use std::collections::{BTreeMap, HashSet};

use super::ledger::{Record, Sight};

/// The states of one key in order. A place is twice an offset. The odd places in between are for
/// values that expire without a record at that offset.
pub struct History {
    states: Vec<(i64, Option<u64>)>,
}

impl History {
    /// Derives the states from a key's records in log order. A duplicate counts at the place of the
    /// first copy, and a record of the projection at the place of its version.
    pub fn of<'a>(records: impl IntoIterator<Item = &'a Record>) -> Self {
        let mut states = vec![(-1, None)];
        let mut ids = HashSet::new();
        for record in records {
            let place = record.place.1 * 2;
            match (record.version, record.number) {
                // A restated value; its original record has the place.
                (Some(_), Some(_)) => {}
                (Some(version), None) => states.push((version * 2 + 1, None)),
                (None, _) if !ids.insert(&record.id) => {}
                (None, number) => {
                    states.push((place, number));
                    if record.expires {
                        states.push((place + 1, None));
                    }
                }
            }
        }
        states.sort_by_key(|(place, _)| *place);
        Self { states }
    }

    /// The last state, which the view shows at the end.
    pub fn last(&self) -> Option<u64> {
        self.states.last().and_then(|(_, state)| *state)
    }

    /// The earliest place at or after `from` with this state.
    fn earliest(&self, from: i64, saw: Option<u64>) -> Option<i64> {
        let begin = self.states.partition_point(|(place, _)| *place < from);
        self.states[begin..].iter().find(|(_, state)| *state == saw).map(|(place, _)| *place)
    }

    fn knows(&self, saw: Option<u64>) -> bool {
        self.states.iter().any(|(_, state)| *state == saw)
    }
}

/// Builds the histories of all keys.
pub fn histories(log: &[Record]) -> BTreeMap<&str, History> {
    let mut by_key: BTreeMap<&str, Vec<&Record>> = BTreeMap::new();
    for record in log {
        by_key.entry(&record.key).or_default().push(record);
    }
    by_key.into_iter().map(|(key, records)| (key, History::of(records))).collect()
}

/// Finds sights of a reader and key that go back in the key's history.
pub fn backward(sights: &[Sight], histories: &BTreeMap<&str, History>) -> Vec<String> {
    let empty = History::of([]);
    let mut reached: BTreeMap<(&str, &str), i64> = BTreeMap::new();
    let mut faults = Vec::new();
    for sight in sights {
        let history = histories.get(sight.key.as_str()).unwrap_or(&empty);
        let at = reached.entry((&sight.reader, &sight.key)).or_insert(-1);
        if let Some(after) = sight.after {
            *at = (*at).max(after * 2);
        }
        // The reader may see the state that it required or saw before, or a later one, but no earlier one.
        let from = history.states.partition_point(|(place, _)| place <= at).saturating_sub(1);
        let from = history.states.get(from).map_or(-1, |(place, _)| *place);
        match history.earliest(from, sight.saw) {
            Some(place) => *at = (*at).max(place),
            None => {
                let how = if history.knows(sight.saw) { "which is older than" } else { "not in the topic, after" };
                faults.push(format!(
                    "{} at {} ms: reader {} saw {:?}, {how} offset {}{}",
                    sight.key,
                    sight.at_ms,
                    sight.reader,
                    sight.saw,
                    *at / 2,
                    sight.after.map(|after| format!(" (it asked for offset {after})")).unwrap_or_default(),
                ));
            }
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(offset: i64, number: Option<u64>) -> Record {
        let id = format!("id{offset}");
        Record { place: (0, offset), key: "k".into(), number, id, version: None, expires: false, origin: None }
    }

    fn faults(log: &[Record], saw: &[(Option<i64>, Option<u64>)]) -> Vec<String> {
        let sight = |(after, saw): &(Option<i64>, Option<u64>)| Sight {
            reader: "r".into(),
            key: "k".into(),
            after: *after,
            saw: *saw,
            at_ms: 0,
        };
        backward(&saw.iter().map(sight).collect::<Vec<_>>(), &histories(log))
    }

    #[test]
    fn a_reader_that_only_goes_forward_is_fine_and_one_that_goes_back_is_found() {
        let log = [record(0, Some(1)), record(1, None), record(2, Some(2)), record(5, Some(3))];
        let see = |saw: &[Option<u64>]| faults(&log, &saw.iter().map(|saw| (None, *saw)).collect::<Vec<_>>());
        assert!(see(&[None, Some(1), Some(1), None, Some(2), Some(3)]).is_empty());
        assert!(see(&[Some(1), None, None, Some(3)]).is_empty());
        assert_eq!(see(&[Some(2), Some(1)]).len(), 1, "back");
        assert_eq!(see(&[Some(2), None]).len(), 1, "disappeared");
        assert_eq!(see(&[Some(1), None, Some(1)]).len(), 1, "returned after its deletion");
        assert_eq!(see(&[Some(9)]).len(), 1, "never written");
    }

    #[test]
    fn who_asks_for_a_write_and_gets_an_older_state_is_found() {
        let log = [record(0, Some(1)), record(1, Some(2)), record(4, None), record(5, Some(3))];
        assert!(faults(&log, &[(Some(1), Some(2)), (Some(1), None), (Some(5), Some(3))]).is_empty());
        assert_eq!(faults(&log, &[(Some(1), Some(1))]).len(), 1);
        assert_eq!(faults(&log, &[(Some(5), None)]).len(), 1);
        assert_eq!(faults(&log, &[(Some(0), None), (Some(0), Some(2))]).len(), 1);
    }

    #[test]
    fn what_ends_by_itself_may_be_absent_from_its_place_on_and_never_again_there() {
        let log = [Record { expires: true, ..record(0, Some(1)) }, record(3, Some(2))];
        assert!(faults(&log, &[(None, Some(1)), (None, None), (None, Some(2))]).is_empty());
        assert!(faults(&log, &[(Some(0), None)]).is_empty());
        assert_eq!(faults(&log, &[(None, Some(1)), (None, None), (None, Some(1))]).len(), 1);
        assert_eq!(faults(&log, &[(None, Some(2)), (None, None)]).len(), 1);
    }

    #[test]
    fn a_double_counts_at_the_place_of_the_first_and_the_projections_own_for_what_they_speak() {
        let double = Record { id: "id0".into(), ..record(2, Some(1)) };
        let restated = Record { version: Some(1), ..record(3, Some(2)) };
        let expired = Record { version: Some(1), ..record(5, None) };
        let mut log = vec![record(0, Some(1)), record(1, Some(2)), double, restated];
        assert_eq!(histories(&log)["k"].last(), Some(2));
        assert_eq!(faults(&log, &[(None, Some(2)), (None, Some(1))]).len(), 1);
        log.push(record(4, Some(3)));
        log.push(expired);
        assert_eq!(histories(&log)["k"].last(), Some(3), "the tombstone applies to offset 1 and not to 4");
        log.truncate(4);
        log.push(Record { version: Some(1), ..record(5, None) });
        assert_eq!(histories(&log)["k"].last(), None);
    }
}
