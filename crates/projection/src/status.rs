//! Readiness of a projection: whether this process has joined its group, and what its partitions
//! still lack.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use postrider_health::Check;

/// Readiness of a projection, shared by the tasks of all partitions.
pub struct ProjectionStatus {
    check: Check,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// True once the group has assigned this process its partitions, even if there are none.
    joined: bool,
    /// Problem of the topic itself, which no partition gets over by reading on.
    fault: Option<String>,
    /// Missing work of each partition; `None` if it is up to date or has been since it was gained.
    lacks: BTreeMap<i32, Option<String>>,
}

impl ProjectionStatus {
    pub fn new(check: Check) -> Self {
        let status = Self { check, state: Mutex::default() };
        status.change(|_| {});
        status
    }

    pub fn joined(&self, gained: &[i32]) {
        self.change(|state| {
            state.joined = true;
            state.lacks.extend(gained.iter().map(|&partition| (partition, Some("starting".to_owned()))));
        });
    }

    pub fn left(&self) {
        self.change(|state| state.joined = false);
    }

    pub fn revoked(&self, partition: i32) {
        self.change(|state| {
            state.lacks.remove(&partition);
        });
    }

    pub fn report(&self, partition: i32, lack: Option<String>) {
        self.change(|state| {
            state.lacks.insert(partition, lack);
        });
    }

    /// Reports a problem that stays, as long as the process runs. The first one is kept.
    pub fn report_fault(&self, problem: String) {
        self.change(|state| {
            state.fault.get_or_insert(problem);
        });
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock();
        change(&mut state);
        match state.problem() {
            None => self.check.pass(),
            Some(problem) => self.check.fail(problem),
        }
    }
}

impl State {
    fn problem(&self) -> Option<String> {
        let waiting = (!self.joined).then(|| "waiting for partitions".to_owned());
        let lacks = self.lacks.iter();
        let lacks = lacks.filter_map(|(number, lack)| Some(format!("partition {number}: {}", lack.as_ref()?)));
        let problems: Vec<String> = waiting.into_iter().chain(self.fault.clone()).chain(lacks).collect();
        (!problems.is_empty()).then(|| problems.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_waits_for_the_assignment_and_then_for_each_assigned_partition() {
        let mut state = State::default();
        assert_eq!(state.problem().unwrap(), "waiting for partitions");
        state.joined = true;
        assert_eq!(state.problem(), None, "a group may have more members than partitions");
        state.lacks.insert(3, Some("starting".to_owned()));
        assert_eq!(state.problem().unwrap(), "partition 3: starting");
        state.lacks.insert(3, None);
        assert_eq!(state.problem(), None);
        state.lacks.clear();
        state.joined = false;
        assert!(state.problem().is_some(), "the assignment was lost");
    }
}
