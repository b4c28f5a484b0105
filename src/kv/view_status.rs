//! Readiness of the view: whether this process has joined its group, and the progress of each of
//! its partitions.

use std::collections::BTreeMap;

/// Shared by the tasks of all partitions.
#[derive(Debug, Default)]
pub struct ViewStatus {
    /// True once the group has assigned partitions to this process, possibly none.
    pub joined: bool,
    /// Missing work of each partition; `None` when its view is complete.
    pub behind: BTreeMap<i32, Option<String>>,
    /// Location of a record in the wrong partition, if one was found.
    pub misplaced: Option<String>,
}

impl ViewStatus {
    /// Returns why the view is not ready, as far as this process is responsible for it.
    pub fn problem(&self) -> Option<String> {
        let behind = self.behind.iter();
        let behind = behind.filter_map(|(number, lack)| Some(format!("partition {number}: {}", lack.as_ref()?)));
        let waiting = (!self.joined).then(|| "waiting for partitions".to_owned());
        let problems: Vec<String> = waiting.into_iter().chain(self.misplaced.clone()).chain(behind).collect();
        (!problems.is_empty()).then(|| problems.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_waits_for_the_assignment_and_then_for_each_partition() {
        let mut status = ViewStatus::default();
        assert_eq!(status.problem().unwrap(), "waiting for partitions");
        status.joined = true;
        assert_eq!(status.problem(), None, "more members than partitions");
        status.behind.insert(3, Some("starting".to_owned()));
        assert_eq!(status.problem().unwrap(), "partition 3: starting");
        status.behind.insert(3, None);
        assert_eq!(status.problem(), None);
        status.behind.clear();
        status.joined = false;
        assert!(status.problem().is_some(), "the assignment was lost");
    }
}
