//! What readiness says of the view: where this process stands in its group, and how far each of its
//! partitions is.

use std::collections::BTreeMap;

/// Shared by the tasks of all partitions.
#[derive(Debug, Default)]
pub struct ViewStatus {
    /// Whether the group has given this process its share, which may be none.
    pub joined: bool,
    /// What each partition still lacks; `None` when it is complete.
    pub behind: BTreeMap<i32, Option<String>>,
    /// Where a record was found that belongs elsewhere.
    pub misplaced: Option<String>,
}

impl ViewStatus {
    /// Why the view is not ready, as far as this process answers for it.
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
    fn it_waits_for_its_share_and_then_for_each_partition_of_it() {
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
        assert!(status.problem().is_some(), "lost, and nothing new yet");
    }
}
