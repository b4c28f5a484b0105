//! Operations on dead letters; a process runs one at a time.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use postrider_kafka::{self as kafka, Admin, Broker, Producer, scan::Scanner};
use serde::Serialize;
use tokio::{runtime::Handle, sync::Semaphore};
use utoipa::ToSchema;

use super::{
    Error,
    change::{Change, Outcome, Report},
    filter::{Filter, Letters},
    letter::{Detail, Summary},
    search::{Bounds, Entry, Found, Search},
};

/// The letters to work on, and the maximum number of them.
#[derive(Debug, Clone)]
pub struct Query {
    pub letters: Letters,
    pub filter: Filter,
    pub limit: usize,
}

/// The newest matching letters.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = DeadLetterList)]
pub struct Listing {
    /// The letter that failed last comes first.
    pub letters: Vec<Summary>,
    /// Number of matching letters.
    pub matched: usize,
    /// True if more letters match than were kept track of; `matched` then counts the newest.
    pub truncated: bool,
}

/// The dead letters of an installation. Cheap to clone.
#[derive(Clone)]
pub struct Queue {
    inner: Arc<Inner>,
}

struct Inner {
    kafka: kafka::Config,
    producer: Producer,
    broker: Broker,
    admin: Arc<Admin>,
    /// Permit to read: reading takes memory and bandwidth, so a process reads for one request at a
    /// time.
    turn: Arc<Semaphore>,
}

impl Queue {
    /// Creates the queue. The producer must send each record alone, so that a record that the
    /// broker rejects does not fail other letters or other writers.
    pub fn new(kafka: kafka::Config, producer: Producer, broker: Broker, admin: Arc<Admin>) -> Self {
        let turn = Arc::new(Semaphore::new(1));
        Self { inner: Arc::new(Inner { kafka, producer, broker, admin, turn }) }
    }

    /// Returns the newest matching letters.
    pub async fn list(&self, query: Query, bounds: Bounds) -> Result<Listing, Error> {
        self.work(query.letters, bounds, move |search, _| {
            let Found { mut entries, truncated } = search.find(&query.filter)?.newest_first();
            let matched = entries.len();
            entries.truncate(query.limit);
            let letters = search.fetch(&entries, |fields, message| Summary::read(fields, message))?;
            Ok(Listing { letters, matched, truncated })
        })
        .await
    }

    /// Returns a letter with everything that was kept of its record; `None` if no letter has this
    /// id.
    pub async fn show(&self, letters: Letters, id: String, bounds: Bounds) -> Result<Option<Detail>, Error> {
        self.work(letters, bounds, move |search, _| {
            let filter = Filter { ids: vec![id], ..Filter::default() };
            let mut found = search.find(&filter)?;
            found.entries.truncate(1);
            Ok(search.fetch(&found.entries, |fields, message| Detail::read(fields, message))?.pop())
        })
        .await
    }

    /// Writes the records of letters to their topics again, unchanged and in their order, and
    /// deletes each letter once its record is stored.
    pub async fn replay(&self, query: Query, dry_run: bool, bounds: Bounds) -> Result<Report, Error> {
        self.change(query, dry_run, bounds, |change, entries| change.replay(entries)).await
    }

    /// Deletes matching letters.
    pub async fn purge(&self, query: Query, dry_run: bool, bounds: Bounds) -> Result<Report, Error> {
        self.change(query, dry_run, bounds, |change, entries| {
            change.purge(entries);
            Ok(())
        })
        .await
    }

    async fn change(
        &self,
        query: Query,
        dry_run: bool,
        bounds: Bounds,
        act: impl FnOnce(&mut Change<'_>, &[Entry]) -> Result<(), Error> + Send + 'static,
    ) -> Result<Report, Error> {
        let runtime = Handle::current();
        self.work(query.letters, bounds, move |search, inner| {
            let found = search.find(&query.filter)?.in_original_order();
            if found.truncated {
                return Err(Error::TooMany(search.bounds.max_letters));
            }
            let matched = found.entries.len();
            let entries = &found.entries[..matched.min(query.limit)];
            let report = Report { dry_run, matched, ..Report::default() };
            let Inner { producer, broker, admin, .. } = inner;
            let mut change = Change { search, producer, broker, admin, runtime, report };
            act(&mut change, entries)?;
            let mut report = change.report;
            report.remaining = matched.saturating_sub(report.letters.len());
            let places: HashMap<&str, usize> =
                entries.iter().enumerate().map(|(at, entry)| (entry.id.as_str(), at)).collect();
            report.letters.sort_by_key(|item| places.get(item.id.as_str()).copied());
            let known: BTreeSet<&str> = found.entries.iter().map(|entry| entry.id.as_str()).collect();
            let wanted: BTreeSet<&str> = query.filter.ids.iter().map(String::as_str).collect();
            for id in wanted.difference(&known) {
                report.add(id, Outcome::NotFound, None);
            }
            if !dry_run {
                let Report { done, skipped, failed, .. } = report;
                tracing::info!(done, skipped, failed, "dead letters replayed or purged");
            }
            Ok(report)
        })
        .await
    }

    /// Runs a job that reads dead-letter topics. The job runs to its end even if the caller stops
    /// waiting.
    async fn work<T: Send + 'static>(
        &self,
        letters: Letters,
        bounds: Bounds,
        job: impl FnOnce(&Search<'_>, &Inner) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let turn = self.inner.turn.clone().try_acquire_owned().map_err(|_| Error::Busy)?;
        let inner = self.inner.clone();
        let done = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            let (scanner, topics) = (Scanner::connect(&inner.kafka)?, letters.topics(&inner.kafka));
            if let Letters::Topic(name) = &letters
                && scanner.spans(name, bounds.deadline)?.is_none()
            {
                return Err(Error::UnknownTopic(name.clone()));
            }
            let prefix = &inner.kafka.topic_prefix;
            job(&Search { scanner: &scanner, topics: &topics, prefix, bounds: &bounds }, &inner)
        });
        done.await.unwrap_or(Err(Error::Ended))
    }
}
