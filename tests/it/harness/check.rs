//! Checkers: no acknowledged write is lost, and no reader sees a value go back. Tests show that
//! they find faults.

use std::collections::BTreeMap;

use super::kafka::Stored;

/// A write as its client knows it: the key and the number written.
pub type Write = (String, u64);

/// A read: the key and its number, or `None` if the key was absent.
pub type Sight = (String, Option<u64>);

/// Returns the acknowledged writes that are in no partition of the log.
pub fn lost(acknowledged: &[Write], log: &[Stored]) -> Vec<Write> {
    let there: std::collections::HashSet<Write> =
        log.iter().filter_map(|record| Some((record.key().to_owned(), record.text().parse().ok()?))).collect();
    acknowledged.iter().filter(|write| !there.contains(*write)).cloned().collect()
}

/// Returns the refused writes that are in the log.
pub fn leaked(refused: &[Write], log: &[Stored]) -> Vec<Write> {
    let missing = lost(refused, log);
    refused.iter().filter(|write| !missing.contains(write)).cloned().collect()
}

/// Lists the keys whose numbers do not increase in the log: reordered, or written twice.
pub fn disordered(log: &[Stored]) -> Vec<String> {
    let mut last: BTreeMap<&str, u64> = BTreeMap::new();
    let mut faults = Vec::new();
    for record in log {
        let Ok(number) = record.text().parse::<u64>() else { continue };
        if let Some(before) = last.insert(record.key(), number).filter(|&before| before >= number) {
            faults.push(format!("{}: {number} after {before}", record.key()));
        }
    }
    faults
}

/// Checks the reads of keys whose writers only count up and never delete.
#[derive(Default)]
pub struct Watch {
    newest: BTreeMap<String, u64>,
    pub faults: Vec<String>,
    pub sights: usize,
}

impl Watch {
    /// Adds a read. Reads of one key must be added in the order in which they were made.
    pub fn see(&mut self, (key, number): Sight) {
        self.sights += 1;
        let before = self.newest.get(&key).copied();
        match (before, number) {
            (Some(before), None) => self.faults.push(format!("{key}: absent after {before}")),
            (Some(before), Some(number)) if number < before => {
                self.faults.push(format!("{key}: {number} after {before}"));
            }
            (_, Some(number)) => {
                self.newest.insert(key, number);
            }
            (None, None) => {}
        }
    }
}

/// Lists the keys whose value in the view is below the last acknowledged one.
pub fn behind(acknowledged: &[Write], view: &BTreeMap<String, Option<u64>>) -> Vec<String> {
    let mut newest: BTreeMap<&str, u64> = BTreeMap::new();
    for (key, number) in acknowledged {
        let entry = newest.entry(key).or_default();
        *entry = (*entry).max(*number);
    }
    let seen = |key: &str| view.get(key).copied().flatten();
    newest
        .into_iter()
        .filter(|(key, number)| seen(key).is_none_or(|found| found < *number))
        .map(|(key, number)| format!("{key}: {:?}, but {number} was acknowledged", seen(key)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(entries: &[(&str, u64)]) -> Vec<Stored> {
        let record = |(offset, (key, number)): (usize, &(&str, u64))| Stored {
            partition: 0,
            offset: i64::try_from(offset).unwrap(),
            key: Some(key.as_bytes().to_vec()),
            value: Some(number.to_string().into_bytes()),
            headers: Vec::new(),
            timestamp_ms: 0,
        };
        entries.iter().enumerate().map(record).collect()
    }

    fn writes(entries: &[(&str, u64)]) -> Vec<Write> {
        entries.iter().map(|(key, number)| ((*key).to_owned(), *number)).collect()
    }

    #[test]
    fn a_lost_write_is_found() {
        let acknowledged = writes(&[("a", 1), ("a", 2), ("b", 1)]);
        assert!(lost(&acknowledged, &log(&[("a", 1), ("b", 1), ("a", 2)])).is_empty());
        assert_eq!(lost(&acknowledged, &log(&[("a", 1), ("b", 1), ("b", 2)])), writes(&[("a", 2)]));
    }

    #[test]
    fn a_refused_write_that_is_there_is_found() {
        let refused = writes(&[("a", 2), ("b", 1)]);
        assert!(leaked(&refused, &log(&[("a", 1), ("a", 3)])).is_empty());
        assert_eq!(leaked(&refused, &log(&[("a", 1), ("a", 2)])), writes(&[("a", 2)]));
    }

    #[test]
    fn a_reordered_or_doubled_write_is_found() {
        assert!(disordered(&log(&[("a", 1), ("b", 1), ("a", 2), ("a", 4)])).is_empty());
        assert_eq!(disordered(&log(&[("a", 2), ("a", 1)])), ["a: 1 after 2"]);
        assert_eq!(disordered(&log(&[("a", 1), ("b", 1), ("a", 1)])), ["a: 1 after 1"]);
    }

    #[test]
    fn a_value_that_goes_back_or_vanishes_is_found() {
        let watch = |numbers: &[Option<u64>]| {
            let mut watch = Watch::default();
            numbers.iter().for_each(|number| watch.see(("a".to_owned(), *number)));
            watch.faults
        };
        assert!(watch(&[None, Some(1), Some(1), Some(3)]).is_empty());
        assert_eq!(watch(&[Some(2), Some(1)]), ["a: 1 after 2"]);
        assert_eq!(watch(&[Some(2), None]), ["a: absent after 2"]);
        assert_eq!(watch(&[Some(3), Some(2), Some(2)]).len(), 2, "the newest stays the measure");
    }

    #[test]
    fn a_view_that_lacks_an_acknowledged_write_is_found() {
        let view = |entries: &[(&str, Option<u64>)]| {
            entries.iter().map(|(key, number)| ((*key).to_owned(), *number)).collect::<BTreeMap<_, _>>()
        };
        let acknowledged = writes(&[("a", 1), ("a", 2), ("b", 1)]);
        assert!(behind(&acknowledged, &view(&[("a", Some(2)), ("b", Some(5))])).is_empty());
        assert_eq!(behind(&acknowledged, &view(&[("a", Some(1)), ("b", Some(1))])).len(), 1);
        assert_eq!(behind(&acknowledged, &view(&[("a", Some(2)), ("b", None)])).len(), 1);
    }
}
