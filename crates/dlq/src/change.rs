//! Replays and purges dead letters.
//!
//! A letter is deleted only after Kafka has confirmed its record in the original topic. If the
//! process stops in between, the letter remains although its record is already written. Replaying
//! it again writes the same event with the same id; consumers that deduplicate by id process it
//! once.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use postrider_kafka::{Admin, Broker, Outgoing, Producer, SendError, Stored, scan::Span};
use rdkafka::Message;
use serde::Serialize;
use tokio::runtime::Handle;
use utoipa::ToSchema;

use super::{
    Error,
    letter::Original,
    search::{Entry, Search, chunks},
};

/// Number of records that are sent before their answers are awaited.
const WINDOW: usize = 500;

/// Result of a replay or purge.
#[derive(Debug, Default, Serialize, ToSchema)]
#[schema(as = DeadLetterReport)]
pub struct Report {
    /// True if nothing was changed; the report then shows what would have been.
    pub dry_run: bool,
    /// Number of letters that matched.
    pub matched: usize,
    /// Number of matched letters that were replayed or purged; in a dry run, that would have been.
    pub done: usize,
    /// Number of matched letters that were left out: superseded or incomplete.
    pub skipped: usize,
    /// Number of matched letters that failed. They are still stored.
    pub failed: usize,
    /// Number of matched letters that were not processed: over the limit, or after a failure. Call
    /// again for the rest.
    pub remaining: usize,
    /// Number of requested ids without a letter that meets the other conditions.
    pub not_found: usize,
    /// The processed letters, in the order of their records; then the ids without a letter.
    pub letters: Vec<Item>,
}

/// Result for one letter.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = DeadLetterResult)]
pub struct Item {
    pub id: String,
    pub outcome: Outcome,
    /// More about the outcome.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub detail: Option<String>,
}

/// Outcome for a letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = DeadLetterOutcome)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The record was written to its topic again, and the letter was deleted.
    Replayed,
    /// The letter was deleted.
    Purged,
    /// Dry run: the record would have been written again, and the letter deleted.
    WouldReplay,
    /// Dry run: the letter would have been deleted.
    WouldPurge,
    /// Left out: the topic is compacted, and the record is no longer the newest with its key.
    Superseded,
    /// Left out: the letter does not hold the whole record.
    Incomplete,
    /// Failed; the letter is still stored.
    Failed,
    /// There is no letter with this id that meets the other conditions.
    NotFound,
}

impl Report {
    pub(super) fn add(&mut self, id: &str, outcome: Outcome, detail: Option<String>) {
        match outcome {
            Outcome::Replayed | Outcome::Purged | Outcome::WouldReplay | Outcome::WouldPurge => self.done += 1,
            Outcome::Superseded | Outcome::Incomplete => self.skipped += 1,
            Outcome::Failed => self.failed += 1,
            Outcome::NotFound => self.not_found += 1,
        }
        self.letters.push(Item { id: id.to_owned(), outcome, detail });
    }
}

/// Properties of a topic that records are written back to.
#[derive(Clone, Copy)]
struct Target {
    /// Number of partitions; `None` if the topic does not exist.
    partitions: Option<i32>,
    compacted: bool,
}

/// Replays or purges the letters that a search found. Blocks: call it off the runtime.
pub struct Change<'a> {
    pub search: &'a Search<'a>,
    pub producer: &'a Producer,
    pub broker: &'a Broker,
    pub admin: &'a Admin,
    pub runtime: Handle,
    pub report: Report,
}

impl Change<'_> {
    /// Deletes these letters.
    pub fn purge(&mut self, entries: &[Entry]) {
        for window in entries.chunks(WINDOW) {
            let places = window.iter().map(|entry| (&*entry.letters, entry.partition, entry.id.as_str()));
            let deleted =
                if self.report.dry_run { window.iter().map(|_| Ok(())).collect() } else { self.delete(places) };
            let purged = if self.report.dry_run { Outcome::WouldPurge } else { Outcome::Purged };
            for (entry, deleted) in window.iter().zip(deleted) {
                match deleted {
                    Ok(()) => self.report.add(&entry.id, purged, None),
                    Err(error) => self.report.add(&entry.id, Outcome::Failed, Some(error.to_string())),
                }
            }
            self.report_progress(entries.len());
            if self.report.failed > 0 {
                return;
            }
        }
    }

    /// Writes the records of these letters to their topics again, and deletes the letters whose
    /// records were written.
    pub fn replay(&mut self, entries: &[Entry]) -> Result<(), Error> {
        let mut targets = HashMap::new();
        for chunk in chunks(entries, self.search.bounds.chunk_bytes) {
            let letters = self.search.fetch(chunk, |fields, message| Original::read(fields, message))?;
            let superseded = self.superseded(&letters, &mut targets)?;
            let mut good = Vec::with_capacity(letters.len());
            for letter in &letters {
                let target = self.target(&mut targets, &letter.topic)?;
                if target.partitions.is_none() {
                    let detail = format!("topic `{}` does not exist", letter.topic);
                    self.report.add(&letter.id, Outcome::Failed, Some(detail));
                } else if !letter.complete {
                    let detail = "the letter holds only part of the record; see its original position".to_owned();
                    self.report.add(&letter.id, Outcome::Incomplete, Some(detail));
                } else if superseded.contains(letter.id.as_str()) {
                    let detail = "a newer record with the same key has superseded it".to_owned();
                    self.report.add(&letter.id, Outcome::Superseded, Some(detail));
                } else {
                    good.push(letter);
                }
            }
            let unreachable = self.write_back(&good, &targets, entries.len());
            if unreachable {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Writes records back and deletes their letters. Returns `true` if it stopped because Kafka
    /// accepts no records at the moment.
    fn write_back(&mut self, letters: &[&Original], targets: &HashMap<String, Target>, total: usize) -> bool {
        // Letters of several consumer groups for one record are adjacent; the record is written
        // once.
        let groups: Vec<&[&Original]> = letters.chunk_by(|a, b| a.place() == b.place()).collect();
        for window in groups.chunks(WINDOW) {
            if self.report.dry_run {
                window
                    .iter()
                    .copied()
                    .flatten()
                    .for_each(|letter| self.report.add(&letter.id, Outcome::WouldReplay, None));
                continue;
            }
            let records = window.iter().filter_map(|group| group.first()).map(|letter| Outgoing {
                topic: &letter.topic,
                partition: partition(letter, targets),
                key: letter.key.as_deref(),
                payload: letter.value.as_deref(),
                headers: Some(letter.headers.clone()),
                ..Outgoing::default()
            });
            let stored = self.store(records);
            let mut written = Vec::new();
            for (group, outcome) in window.iter().zip(&stored) {
                for letter in *group {
                    match outcome {
                        Ok(_) => written.push(*letter),
                        Err(error) => self.report.add(&letter.id, Outcome::Failed, Some(error.to_string())),
                    }
                }
            }
            let places = written.iter().map(|letter| (&*letter.letters, letter.letters_partition, letter.id.as_str()));
            for (letter, deleted) in written.iter().zip(self.delete(places)) {
                let detail = |error| format!("the record was written, but the letter could not be deleted: {error}");
                match deleted {
                    Ok(()) => self.report.add(&letter.id, Outcome::Replayed, None),
                    Err(error) => self.report.add(&letter.id, Outcome::Failed, Some(detail(error))),
                }
            }
            self.report_progress(total);
            if stored.iter().any(|outcome| matches!(outcome, Err(error) if is_outage(error))) {
                return true;
            }
        }
        false
    }

    /// Returns the ids of the letters whose record is not the newest with its key in a compacted
    /// topic. A record that compaction has removed also counts, because a newer one must have
    /// existed.
    fn superseded<'a>(
        &self,
        letters: &'a [Original],
        targets: &mut HashMap<String, Target>,
    ) -> Result<HashSet<&'a str>, Error> {
        let mut by_partition: HashMap<(&str, i32), Vec<&Original>> = HashMap::new();
        for letter in letters {
            if self.target(targets, &letter.topic)?.compacted {
                by_partition.entry((&letter.topic, letter.partition)).or_default().push(letter);
            }
        }
        let mut superseded = HashSet::new();
        for ((topic, partition), letters) in by_partition {
            let mut newest: HashMap<&[u8], i64> =
                letters.iter().filter_map(|letter| Some((letter.key.as_deref()?, -1))).collect();
            let from = letters.iter().map(|letter| letter.offset).min().unwrap_or(0);
            let spans = self.search.scanner.spans(topic, self.search.bounds.deadline)?.unwrap_or_default();
            if let Some(span) = spans.into_iter().find(|span| span.partition == partition) {
                let span = [Span { from: from.max(span.from), ..span }];
                self.search.scan(topic, &span, &format!("looking for newer records in {topic}"), |message| {
                    if let Some(last) = message.key().and_then(|key| newest.get_mut(key)) {
                        *last = message.offset();
                    }
                })?;
            }
            let is_newest =
                |letter: &&Original| letter.key.as_deref().and_then(|key| newest.get(key)) == Some(&letter.offset);
            superseded.extend(letters.iter().filter(|letter| !is_newest(letter)).map(|letter| letter.id.as_str()));
        }
        Ok(superseded)
    }

    fn target(&self, known: &mut HashMap<String, Target>, topic: &str) -> Result<Target, Error> {
        if let Some(target) = known.get(topic) {
            return Ok(*target);
        }
        let partitions = self.runtime.block_on(self.broker.partitions(topic))?;
        let compacted = partitions.is_some() && self.runtime.block_on(self.admin.is_compacted(topic))?;
        let target = Target { partitions, compacted };
        known.insert(topic.to_owned(), target);
        Ok(target)
    }

    /// Writes a tombstone for each letter to the partition that holds it.
    fn delete<'a>(&self, letters: impl Iterator<Item = (&'a str, i32, &'a str)>) -> Vec<Result<(), SendError>> {
        let tombstones = letters.map(|(topic, partition, id)| Outgoing {
            topic,
            partition: Some(partition),
            key: Some(id.as_bytes()),
            ..Outgoing::default()
        });
        self.store(tombstones).into_iter().map(|stored| stored.map(|_| ())).collect()
    }

    /// Sends records in their order, and then waits for all answers.
    fn store<'a>(&self, records: impl Iterator<Item = Outgoing<'a>>) -> Vec<Result<Stored, SendError>> {
        let answers = records.map(|record| {
            let topic = record.topic;
            let bytes = record.key.map_or(0, <[u8]>::len) + record.payload.map_or(0, <[u8]>::len);
            while !self.producer.has_room(bytes) && Instant::now() < self.search.bounds.deadline {
                std::thread::sleep(Duration::from_millis(2));
            }
            let taken = self.producer.send(record);
            async move { taken?.stored(topic).await }
        });
        let answers: Vec<_> = answers.collect();
        self.runtime.block_on(join_all(answers))
    }

    fn report_progress(&self, total: usize) {
        let what = if self.report.dry_run { "checking" } else { "writing" };
        (self.search.bounds.progress)(what, self.report.letters.len() as u64, total as u64);
    }
}

/// Returns the record's original partition, which keeps the order of its key and any partition that
/// was chosen explicitly. Returns `None` to choose by key if the topic no longer has that
/// partition.
fn partition(letter: &Original, targets: &HashMap<String, Target>) -> Option<i32> {
    let partitions = targets.get(&letter.topic).and_then(|target| target.partitions)?;
    (letter.partition < partitions).then_some(letter.partition)
}

/// Returns whether other records would fail with the same error now.
fn is_outage(error: &SendError) -> bool {
    matches!(error, SendError::Full | SendError::Unavailable | SendError::Unknown)
}
