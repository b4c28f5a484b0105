//! What a run was: counts, faults, the time that nothing got through, and what was found.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
};

use super::{
    check::Finding,
    ledger::{Evidence, Kind, Topic, Verdict},
};

/// Findings of a rule that are shown in full.
const SHOWN: usize = 5;

pub struct Report<'a> {
    pub evidence: &'a Evidence,
    pub findings: &'a [Finding],
    pub seed: u64,
    pub lasted_ms: u64,
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "\nsoak: {:.0} s, seed {}\n", self.lasted_ms as f64 / 1e3, self.seed)?;
        self.writes(out)?;
        self.sinks(out)?;
        self.faults(out)?;
        for (role, kib) in &self.evidence.peak_rss_kib {
            writeln!(out, "  at most {:>4} MiB resident   {role}", kib >> 10)?;
        }
        self.findings(out)
    }
}

impl Report<'_> {
    fn writes(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            out,
            "  {:<10} {:>9} {:>13} {:>9} {:>9} {:>9}",
            "", "sent", "acknowledged", "refused", "unknown", "attempts"
        )?;
        for kind in Kind::ALL {
            let (mut counts, mut attempts, mut sent) = (BTreeMap::new(), 0, 0);
            for write in self.evidence.writes.iter().filter(|write| write.kind == kind) {
                *counts.entry(write.verdict()).or_insert(0_usize) += 1;
                attempts += write.attempts.len();
                sent += 1;
            }
            let of = |verdict| counts.get(&verdict).copied().unwrap_or(0);
            writeln!(
                out,
                "  {:<10} {sent:>9} {:>13} {:>9} {:>9} {attempts:>9}",
                format!("{kind:?}").to_lowercase(),
                of(Verdict::Acknowledged),
                of(Verdict::Refused),
                of(Verdict::Unknown),
            )?;
        }
        let answers: Vec<_> =
            self.evidence.answers.iter().map(|(answer, count)| format!("{count} x {answer}")).collect();
        writeln!(out, "  answers other than success: {}\n", answers.join(", "))
    }

    fn sinks(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let evidence = self.evidence;
        for topic in Topic::ALL {
            writeln!(out, "  {:>9} records in {}", evidence.logs.get(&topic).map_or(0, Vec::len), topic.name())?;
        }
        let taken = evidence.deliveries.iter().filter(|delivery| delivery.taken).count();
        let streamed = evidence.streamed.values().map(Vec::len).sum::<usize>();
        for (count, what) in [
            (evidence.view.len(), "keys in the view".to_owned()),
            (evidence.sights.len(), "reads of it that said something".to_owned()),
            (evidence.deliveries.len(), format!("deliveries, {taken} of them taken")),
            (evidence.listed.len(), "comments listed".to_owned()),
            (streamed, format!("streamed to {} readers", evidence.streamed.len())),
            (
                evidence.mailboxes.values().map(Vec::len).sum(),
                format!("messages of {} receivers", evidence.mailboxes.len()),
            ),
            (
                evidence.sessions.iter().map(|session| session.got.len()).sum(),
                format!("got by devices over {} connections", evidence.sessions.len()),
            ),
            (evidence.commits.len(), "samples of what is committed".to_owned()),
        ] {
            writeln!(out, "  {count:>9} {what}")?;
        }
        writeln!(out)
    }

    /// Of each kind of fault: how often, and the longest time without a success on each path.
    fn faults(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paths = paths(self.evidence);
        let mut kinds: BTreeMap<&str, (usize, Vec<u64>)> = BTreeMap::new();
        for fault in &self.evidence.faults {
            // From the beginning of the next one on it is that one's time.
            let next = self.evidence.faults.iter().map(|next| next.from_ms).filter(|at| *at > fault.to_ms).min();
            let until_ms = next.unwrap_or(self.lasted_ms).min(fault.to_ms + 10_000);
            let (count, worst) = kinds.entry(fault.kind).or_insert_with(|| (0, vec![0; paths.len()]));
            *count += 1;
            for (worst, (_, times)) in worst.iter_mut().zip(&paths) {
                *worst = (*worst).max(gap_ms(times, fault.from_ms, until_ms));
            }
        }
        let mut head = format!("  {:<20} {:>5}   longest time without:", "fault", "times");
        paths.iter().try_for_each(|(name, _)| write!(head, " {name:>9}"))?;
        writeln!(out, "{head}")?;
        for (kind, (count, worst)) in kinds {
            write!(out, "  {kind:<20} {count:>5} {:>23}", "")?;
            worst.iter().try_for_each(|ms| write!(out, " {:>7.1} s", *ms as f64 / 1e3))?;
            writeln!(out)?;
        }
        writeln!(out)
    }

    fn findings(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rules: BTreeMap<&str, Vec<&Finding>> = BTreeMap::new();
        self.findings.iter().for_each(|finding| rules.entry(finding.rule).or_default().push(finding));
        for (rule, findings) in &rules {
            writeln!(out, "\n  VIOLATED {} times: {rule}", findings.len())?;
            findings.iter().take(SHOWN).try_for_each(|finding| writeln!(out, "    {}", finding.detail))?;
        }
        if rules.is_empty() {
            return writeln!(out, "\n  nothing is violated");
        }
        writeln!(out, "\n  What was broken when, in ms:")?;
        let mut faults = self.evidence.faults.iter();
        faults.try_for_each(|fault| {
            writeln!(out, "    {} to {}  {}: {}", fault.from_ms, fault.to_ms, fault.kind, fault.what)
        })
    }
}

/// When something got through, by path.
fn paths(evidence: &Evidence) -> Vec<(&'static str, Vec<u64>)> {
    let done = |topic: Topic| {
        let writes = evidence.writes.iter().filter(move |write| write.kind.topic() == topic);
        writes.filter_map(|write| write.done_ms).collect::<Vec<u64>>()
    };
    let taken = evidence.deliveries.iter().filter(|delivery| delivery.taken).map(|delivery| delivery.at_ms).collect();
    let mut paths = vec![
        ("a push", done(Topic::Messages)),
        ("produce", done(Topic::Orders)),
        ("comment", done(Topic::Comments)),
        ("a pull", evidence.sights.iter().map(|sight| sight.at_ms).collect()),
        ("delivery", taken),
        ("message", done(Topic::Chat)),
        ("a frame", evidence.sessions.iter().flat_map(|session| &session.got).map(|got| got.at_ms).collect()),
    ];
    paths.iter_mut().for_each(|(_, times)| times.sort_unstable());
    paths
}

/// The longest time between successes, from the one before the beginning to the one after the end at most.
fn gap_ms(times: &[u64], from_ms: u64, until_ms: u64) -> u64 {
    let inside = times.iter().copied().filter(|at| (from_ms..until_ms).contains(at));
    let edges: Vec<u64> = [from_ms].into_iter().chain(inside).chain([until_ms]).collect();
    edges.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_is_within_the_time_of_the_fault() {
        assert_eq!(gap_ms(&[0, 100, 900, 1_000, 5_000], 500, 2_000), 1_000);
        assert_eq!(gap_ms(&[], 500, 2_000), 1_500);
    }
}
