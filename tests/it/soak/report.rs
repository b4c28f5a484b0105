//! The report of a run: counts, faults, recovery times and findings.

use std::{collections::BTreeMap, fmt};

use super::{
    check::Finding,
    ledger::{Evidence, Kind, Topic, Verdict},
    recovery::{Service, recoveries},
};

/// The number of findings of a rule that are printed.
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
        writeln!(out, "  responses other than success: {}\n", answers.join(", "))
    }

    fn sinks(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let evidence = self.evidence;
        for topic in Topic::ALL {
            let count = match topic {
                Topic::Posts => evidence.posts.len(),
                Topic::Presence => evidence.presence.len(),
                Topic::Undelivered => evidence.undelivered.len(),
                _ => evidence.logs.get(&topic).map_or(0, Vec::len),
            };
            writeln!(out, "  {count:>9} records in {}", topic.name())?;
        }
        let taken = evidence.deliveries.iter().filter(|delivery| delivery.taken).count();
        let streamed = evidence.streamed.values().map(Vec::len).sum::<usize>();
        for (count, what) in [
            (evidence.view.len(), "keys in the view".to_owned()),
            (evidence.sights.len(), "successful reads of the view".to_owned()),
            (evidence.deliveries.len(), format!("deliveries, {taken} of them accepted")),
            (evidence.listed.len(), "comments listed".to_owned()),
            (streamed, format!("streamed to {} readers", evidence.streamed.len())),
            (
                evidence.mailboxes.values().map(Vec::len).sum(),
                format!("messages of {} receivers", evidence.mailboxes.len()),
            ),
            (
                evidence.sessions.iter().map(|session| session.got.len()).sum(),
                format!("messages at devices over {} connections", evidence.sessions.len()),
            ),
            (evidence.pages.len(), "pages of feeds".to_owned()),
            (evidence.feeds.values().map(Vec::len).sum(), format!("posts in {} feeds", evidence.feeds.len())),
            (evidence.commits.len(), "samples of commits".to_owned()),
        ] {
            writeln!(out, "  {count:>9} {what}")?;
        }
        writeln!(out)
    }

    /// Prints for each kind of fault how often it occurred, and the longest time from its end, with
    /// faults that overlap it, to the first success of each service.
    fn faults(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut kinds: BTreeMap<&str, (usize, BTreeMap<Service, u64>)> = BTreeMap::new();
        for fault in &self.evidence.faults {
            kinds.entry(fault.kind).or_default().0 += 1;
        }
        for recovery in recoveries(self.evidence) {
            let (_, longest) = kinds.entry(recovery.kind).or_default();
            let took_ms = recovery.back_ms.unwrap_or(self.lasted_ms).saturating_sub(recovery.ended_ms);
            let longest = longest.entry(recovery.service).or_default();
            *longest = took_ms.max(*longest);
        }
        write!(out, "  {:<22} {:>5}   back after:", "fault", "times")?;
        Service::ALL.iter().try_for_each(|service| write!(out, " {service:>9}"))?;
        writeln!(out)?;
        for (kind, (count, longest)) in kinds {
            write!(out, "  {kind:<22} {count:>5} {:>13}", "")?;
            for service in Service::ALL {
                let took_ms = longest.get(&service).copied().unwrap_or(0);
                write!(out, " {:>7.1} s", took_ms as f64 / 1e3)?;
            }
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
            return writeln!(out, "\n  no rule is violated");
        }
        writeln!(out, "\n  Faults, in ms since the start:")?;
        let mut faults = self.evidence.faults.iter();
        faults.try_for_each(|fault| {
            writeln!(out, "    {} to {}  {}: {}", fault.from_ms, fault.to_ms, fault.kind, fault.what)
        })
    }
}
