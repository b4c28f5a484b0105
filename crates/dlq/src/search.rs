//! Search for dead letters: a dead-letter topic is read once to index it, and then only the offset
//! range that holds the matching letters.
//!
//! Only the id and position of a matching letter are kept in memory. The last record of a key
//! counts, and a tombstone deletes the letter, whether compaction has happened or not.

use std::{collections::HashMap, ops::ControlFlow, sync::Arc, time::Instant};

use postrider_kafka::{
    Position,
    scan::{Scanner, Span},
};
use rdkafka::{Message, message::BorrowedMessage};

use super::{Error, filter::Filter, letter::Fields};

/// Limits of one operation, and its progress callback.
pub struct Bounds {
    pub deadline: Instant,
    /// Maximum number of letters that are kept track of at a time.
    pub max_letters: usize,
    /// Maximum number of bytes of letters in memory at a time.
    pub chunk_bytes: usize,
    pub progress: Progress,
}

/// Callback that receives a description of the current work, the amount done, and the total.
pub type Progress = Box<dyn Fn(&str, u64, u64) + Send>;

/// A matching letter.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The dead-letter topic; the letter's position in it follows.
    pub letters: Arc<str>,
    pub partition: i32,
    pub offset: i64,
    pub id: String,
    pub failed_ms: i64,
    bytes: usize,
}

impl Entry {
    /// Returns the sort key that orders letters as their records were in their topics.
    fn original(&self) -> (String, i32, i64) {
        let position = self.id.rsplit_once(' ').map_or(&*self.id, |(position, _)| position);
        let position = position.parse::<Position>().ok();
        position.map_or_else(|| (self.id.clone(), 0, 0), |at| (at.topic, at.partition, at.offset))
    }
}

/// The matching letters.
pub struct Found {
    pub entries: Vec<Entry>,
    /// True if more letters matched than may be kept track of; the newest are in `entries`.
    pub truncated: bool,
}

impl Found {
    /// Sorts the newest letter first.
    pub fn newest_first(mut self) -> Self {
        self.entries.sort_by(|a, b| (b.failed_ms, &b.id).cmp(&(a.failed_ms, &a.id)));
        self
    }

    /// Sorts letters in the order of the records in their topics.
    pub fn in_original_order(mut self) -> Self {
        self.entries.sort_by_cached_key(Entry::original);
        self
    }
}

/// Reads dead-letter topics. Blocks: call it off the runtime.
pub struct Search<'a> {
    pub scanner: &'a Scanner,
    /// Full names of the dead-letter topics.
    pub topics: &'a [String],
    /// The prefix of our own topics.
    pub prefix: &'a str,
    pub bounds: &'a Bounds,
}

impl Search<'_> {
    /// Finds every matching letter, in no order. A topic that does not exist yet has none.
    pub fn find(&self, filter: &Filter) -> Result<Found, Error> {
        let mut found = Found { entries: Vec::new(), truncated: false };
        for topic in self.topics {
            let Some(spans) = self.scanner.spans(topic, self.bounds.deadline)? else { continue };
            let letters: Arc<str> = topic.as_str().into();
            let mut index: HashMap<String, Entry> = HashMap::new();
            self.scan(topic, &spans, &format!("reading {topic}"), |message| {
                let Some(id) = message.key().and_then(|key| std::str::from_utf8(key).ok()) else { return };
                match Fields::of(message).filter(|fields| filter.matches(fields, self.prefix)) {
                    None => drop(index.remove(id)),
                    Some(fields) => {
                        let entry = Entry {
                            letters: letters.clone(),
                            partition: message.partition(),
                            offset: message.offset(),
                            id: id.to_owned(),
                            failed_ms: fields.failed_ms(),
                            bytes: message.payload_len() + message.key_len(),
                        };
                        index.insert(id.to_owned(), entry);
                    }
                }
                if index.len() > 2 * self.bounds.max_letters {
                    found.truncated = true;
                    keep_newest(&mut index, self.bounds.max_letters);
                }
            })?;
            found.entries.extend(index.into_values());
        }
        Ok(found)
    }

    /// Reads letters again, in this order. A letter that was deleted in between is left out.
    pub fn fetch<T>(
        &self,
        entries: &[Entry],
        mut read: impl FnMut(&Fields<'_>, &BorrowedMessage<'_>) -> T,
    ) -> Result<Vec<T>, Error> {
        let mut slots: Vec<Option<T>> = entries.iter().map(|_| None).collect();
        for topic in self.topics {
            let mut wanted: HashMap<(i32, i64), usize> = HashMap::new();
            let mut spans: HashMap<i32, Span> = HashMap::new();
            for (at, entry) in entries.iter().enumerate().filter(|(_, entry)| *entry.letters == **topic) {
                let (partition, offset) = (entry.partition, entry.offset);
                wanted.insert((partition, offset), at);
                let span = spans.entry(partition).or_insert(Span { partition, from: offset, to: offset + 1 });
                (span.from, span.to) = (span.from.min(offset), span.to.max(offset + 1));
            }
            let spans: Vec<Span> = spans.into_values().collect();
            self.scan(topic, &spans, &format!("fetching letters from {topic}"), |message| {
                if let Some(&at) = wanted.get(&(message.partition(), message.offset())) {
                    slots[at] = Fields::of(message).map(|fields| read(&fields, message));
                }
            })?;
        }
        Ok(slots.into_iter().flatten().collect())
    }

    /// Passes every record of the spans to `visit` and reports the progress.
    pub fn scan(
        &self,
        topic: &str,
        spans: &[Span],
        what: &str,
        mut visit: impl FnMut(&BorrowedMessage<'_>),
    ) -> Result<(), Error> {
        let size = |span: &Span| u64::try_from(span.to - span.from).unwrap_or(0);
        let (mut done, total) = (0, spans.iter().map(size).sum());
        self.scanner.read(topic, spans, self.bounds.deadline, |message| {
            visit(message);
            done += 1;
            (self.bounds.progress)(what, done, total);
            ControlFlow::Continue(())
        })?;
        Ok(())
    }
}

/// Splits entries, keeping their order, into chunks of at most `max_bytes` and at least one entry.
pub fn chunks(mut entries: &[Entry], max_bytes: usize) -> impl Iterator<Item = &[Entry]> {
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = entries.iter().take_while(|entry| {
            bytes += entry.bytes;
            bytes <= max_bytes
        });
        let count = fits.count().max(1).min(entries.len());
        let (chunk, rest) = entries.split_at(count);
        entries = rest;
        (!chunk.is_empty()).then_some(chunk)
    })
}

fn keep_newest(index: &mut HashMap<String, Entry>, count: usize) {
    let mut times: Vec<i64> = index.values().map(|entry| entry.failed_ms).collect();
    let Some(cut) = times.len().checked_sub(count.max(1)) else { return };
    let oldest_kept = *times.select_nth_unstable(cut).1;
    let newer = times.iter().filter(|&&time| time > oldest_kept).count();
    let mut ties = count.saturating_sub(newer);
    index.retain(|_, entry| {
        let stays = entry.failed_ms > oldest_kept || (entry.failed_ms == oldest_kept && ties > 0);
        if stays && entry.failed_ms == oldest_kept {
            ties -= 1;
        }
        stays
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: &str, failed_ms: i64, bytes: usize) -> Entry {
        Entry { letters: "dead".into(), partition: 0, offset: 0, id: id.to_owned(), failed_ms, bytes }
    }

    #[test]
    fn at_most_the_given_number_of_newest_letters_is_kept_even_if_all_failed_at_once() {
        let index = |times: &[i64]| {
            let entries = times.iter().enumerate().map(|(at, &time)| (at.to_string(), entry(&at.to_string(), time, 0)));
            entries.collect::<HashMap<_, _>>()
        };
        for (times, kept) in
            [(&[5, 1, 4, 2, 3][..], &[4, 5][..]), (&[7, 7, 7, 7], &[7, 7]), (&[7, 7, 9, 7], &[7, 9]), (&[1], &[1])]
        {
            let mut index = index(times);
            keep_newest(&mut index, 2);
            let mut left: Vec<i64> = index.values().map(|entry| entry.failed_ms).collect();
            left.sort_unstable();
            assert_eq!(left, kept, "{times:?}");
        }
    }

    #[test]
    fn letters_are_replayed_in_the_order_of_their_records() {
        let ids = ["b/0@9 g", "a/1@2 g", "a/0@10 g", "a/0@9 h", "a/0@9 g"];
        let entries = ids.iter().enumerate().map(|(at, id)| entry(id, at as i64, 0)).collect();
        let found = Found { entries, truncated: false }.in_original_order();
        let order: Vec<&str> = found.entries.iter().map(|entry| entry.id.as_str()).collect();
        assert_eq!(order, ["a/0@9 h", "a/0@9 g", "a/0@10 g", "a/1@2 g", "b/0@9 g"]);
    }

    #[test]
    fn chunks_stay_within_the_limit_unless_one_letter_is_larger() {
        let entries: Vec<Entry> = [40, 60, 10, 500, 5].iter().map(|&bytes| entry("a/0@0 g", 0, bytes)).collect();
        let sizes: Vec<usize> = chunks(&entries, 100).map(<[Entry]>::len).collect();
        assert_eq!(sizes, [2, 1, 1, 1]);
        assert_eq!(chunks(&[], 100).count(), 0);
    }
}
