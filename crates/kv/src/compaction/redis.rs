//! View in a Redis server of the test, changed by production code.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use postrider_config::SecretUrl;
use postrider_kafka::{batch::Batch, event::Event};
use postrider_redis::{Config, Redis};
use postrider_telemetry::trace_context::TraceContext;
use postrider_time::clock;
use rdkafka::{
    Timestamp,
    message::{Header, OwnedHeaders, OwnedMessage},
};
use tokio::runtime::Runtime;
use uuid::Uuid;

use super::{Kind, Record, Restated, Value, View};
use crate::{
    EXPIRES_HEADER,
    entry::{Entry, Marker, State},
    keys::Keys,
    restate::Restatement,
    script::Scripts,
    view::Partition,
};

/// Time of hour 0, in ms since the Unix epoch; and the length of an hour.
const EPOCH_MS: i64 = 1_700_000_000_000;
const HOUR_MS: i64 = 3_600_000;

/// A `redis-server` without persistence. It stops when this value is dropped, and also when the
/// process dies, because its shell then reads the end of a pipe.
pub(super) struct Server {
    shell: Child,
    folder: PathBuf,
    runtime: Runtime,
    redis: Option<Redis>,
}

impl Server {
    pub(super) fn start() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("postrider-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let socket = folder.join("redis.sock");
        let shell = Command::new("sh")
            .args(["-c", "redis-server \"$@\" & read -r _; kill $!; wait", "redis"])
            .args(["--port", "0", "--save", "", "--appendonly", "no", "--loglevel", "warning"])
            .arg("--unixsocket")
            .arg(&socket)
            .arg("--dir")
            .arg(&folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut server = Self { shell, folder, runtime, redis: None };
        let config = Config {
            url: SecretUrl::new(format!("redis+unix://{}", socket.display())),
            response_timeout_ms: 30_000,
            connect_timeout_ms: 30_000,
            ..Config::default()
        };
        let begun = Instant::now();
        server.redis = loop {
            match server.runtime.block_on(Redis::connect(&config)) {
                Ok(redis) => break Some(redis),
                Err(error) => assert!(begun.elapsed() < Duration::from_secs(60), "redis-server: {error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        server
    }

    fn redis(&self) -> Redis {
        self.redis.clone().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

pub(super) struct RedisView<'a> {
    server: &'a Server,
    scripts: &'a Scripts,
    redis: Redis,
    partition: Partition,
}

impl<'a> RedisView<'a> {
    /// Creates an empty view.
    pub(super) fn new(server: &'a Server, scripts: &'a Scripts) -> Self {
        let (keys, marker) = (Keys::new("test:", 0, 0), Marker::new(0, None));
        let partition = Partition { number: 0, partitions: 1, keys, marker, settled: 0 };
        let mut view = Self { server, scripts, redis: server.redis(), partition };
        view.rebuild(true, &[], 0, 0);
        view
    }

    fn id_keys(&self) -> Vec<String> {
        let keys = (0..2).flat_map(|key| (0..4).map(move |id| (key, id)));
        keys.map(|(key, id)| self.partition.keys.id(Uuid::new_v5(&uuid_of(id), &name(key)))).collect()
    }

    fn mark(&mut self, expected: &str, marker: Marker, drop_view: bool) {
        let marked = self.partition.mark(self.scripts, &mut self.redis, expected, marker, drop_view);
        self.server.runtime.block_on(marked).unwrap();
    }

    fn restated(restatements: Vec<Restatement>) -> Vec<Restated> {
        let restated = |restatement: Restatement| {
            let message = message(&restatement.key, restatement.value.clone(), 0, 0, restatement.headers());
            let mut batch = Batch::default();
            batch.push(&message);
            let record = batch.record(0);
            let expires = record.header(EXPIRES_HEADER).map(|text| hour_of(text_of(text).parse().unwrap()));
            let value = record.value().map(|text| (text_of(text).parse().unwrap(), expires));
            (restatement.key[0] - b'a', restatement.version, value)
        };
        restatements.into_iter().map(restated).collect()
    }
}

impl View for RedisView<'_> {
    fn next(&self) -> i64 {
        self.partition.marker.next
    }

    fn apply(&mut self, records: &[Record], hour: i32) {
        let batch = batch_of(records);
        if batch.next_offset().is_some_and(|next| next > self.partition.marker.next) {
            let written = self.partition.write(self.scripts, &mut self.redis, &batch, ms(hour));
            assert!(self.server.runtime.block_on(written).unwrap().is_empty());
        }
    }

    fn restatements(&mut self, records: &[Record], settled: i64) -> Vec<Restated> {
        self.partition.settled = settled;
        let batch = batch_of(records);
        let restatements = self.partition.restatements(&mut self.redis, &batch);
        Self::restated(self.server.runtime.block_on(restatements).unwrap())
    }

    fn expired(&mut self, hour: i32) -> Vec<Restated> {
        let mut tombstones = Vec::new();
        loop {
            // One key per call, so that there are several rounds.
            let expired = self.partition.expired(self.scripts, &mut self.redis, ms(hour), 1);
            let expired = self.server.runtime.block_on(expired).unwrap();
            tombstones.extend(Self::restated(expired.tombstones));
            if expired.due < 1 {
                break;
            }
        }
        tombstones.sort_by_key(|(key, ..)| *key);
        tombstones
    }

    fn rebuild(&mut self, ids_too: bool, log: &[Record], end: i64, hour: i32) {
        let mut lost = redis::cmd("DEL");
        lost.arg(&self.partition.keys.view).arg(&self.partition.keys.ends);
        if ids_too {
            lost.arg(self.id_keys());
        }
        self.server.runtime.block_on(lost.query_async::<()>(&mut self.redis)).unwrap();
        let low = log.first().map_or(end, |record| record.offset);
        self.mark("", Marker::new(low, Some(end)), true);
        for records in log.chunks(7) {
            self.apply(records, hour);
        }
        let expected = self.partition.marker.encode();
        self.mark(&expected, Marker::new(end, None), false);
    }

    fn pass(&mut self, hours: i32) {
        const SHORTEN: &str = "for _, key in ipairs(KEYS) do
            local left = redis.call('PTTL', key)
            if left >= 0 then redis.call('PEXPIRE', key, left - ARGV[1]) end
        end";
        let keys = self.id_keys();
        let mut passed = redis::cmd("EVAL");
        passed.arg(SHORTEN).arg(keys.len()).arg(keys).arg(i64::from(hours) * HOUR_MS);
        self.server.runtime.block_on(passed.query_async::<()>(&mut self.redis)).unwrap();
    }

    fn entries(&mut self) -> BTreeMap<u8, (i64, Value)> {
        let mut all = redis::cmd("HGETALL");
        all.arg(&self.partition.keys.view);
        let found: BTreeMap<Vec<u8>, Vec<u8>> = self.server.runtime.block_on(all.query_async(&mut self.redis)).unwrap();
        let entry = |(key, entry): (&Vec<u8>, &Vec<u8>)| {
            let Entry { version, state } = Entry::decode(entry).unwrap();
            let value = match state {
                State::Value { value, expires_ms } => Some((text_of(value).parse().unwrap(), expires_ms.map(hour_of))),
                State::Deleted => None,
            };
            (key[0] - b'a', (version, value))
        };
        found.iter().filter(|(key, _)| !key.is_empty()).map(entry).collect()
    }
}

fn ms(hour: i32) -> i64 {
    EPOCH_MS + i64::from(hour) * HOUR_MS
}

fn hour_of(ms: i64) -> i32 {
    i32::try_from((ms - EPOCH_MS) / HOUR_MS).unwrap()
}

fn name(key: u8) -> [u8; 1] {
    [b'a' + key]
}

fn uuid_of(id: u8) -> Uuid {
    Uuid::new_v5(&Uuid::NAMESPACE_URL, &[id])
}

fn text_of(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Returns the records as a batch read from Kafka.
fn batch_of(records: &[Record]) -> Batch {
    let mut batch = Batch::default();
    for record in records {
        let text = record.value.map(|(number, _)| number.to_string().into_bytes());
        let expires_ms = record.value.and_then(|(_, expires)| expires).map(ms);
        let headers = match record.kind {
            Kind::Restated(version) => {
                let state = match &text {
                    Some(value) => State::Value { value, expires_ms },
                    None => State::Deleted,
                };
                // The record does not contain its own version.
                Restatement::of_entry(&name(record.key), &Entry { version: 0, state }, version).headers()
            }
            Kind::Plain => pushed(Uuid::now_v7(), expires_ms),
            Kind::Idempotent(id) => pushed(uuid_of(id), expires_ms),
        };
        batch.push(&message(&name(record.key), text, record.offset, ms(record.hour), headers));
    }
    batch
}

fn pushed(id: Uuid, expires_ms: Option<i64>) -> OwnedHeaders {
    let event = Event { id, kind: "postrider.kv.pushed", source: "/kv", trace: TraceContext::root() };
    let headers = event.headers(1);
    match expires_ms {
        Some(ms) => headers.insert(Header { key: EXPIRES_HEADER, value: Some(&ms.to_string()) }),
        None => headers,
    }
}

fn message(key: &[u8], value: Option<Vec<u8>>, offset: i64, at_ms: i64, headers: OwnedHeaders) -> OwnedMessage {
    let timestamp = Timestamp::LogAppendTime(at_ms);
    OwnedMessage::new(value, Some(key.to_vec()), "messages".to_owned(), timestamp, 0, offset, Some(headers))
}

#[test]
fn a_value_that_expired_before_1970_gets_its_tombstone() {
    let (server, scripts) = (Server::start(), Scripts::default());
    let RedisView { mut redis, mut partition, .. } = RedisView::new(&server, &scripts);
    let mut batch = Batch::default();
    batch.push(&message(b"a", Some(b"1".to_vec()), 0, EPOCH_MS, pushed(Uuid::now_v7(), Some(-5))));
    let tombstones = server.runtime.block_on(async {
        partition.write(&scripts, &mut redis, &batch, EPOCH_MS).await.unwrap();
        partition.expired(&scripts, &mut redis, EPOCH_MS, 10).await.unwrap().tombstones
    });
    assert_eq!(RedisView::restated(tombstones), [(0, 0, None)]);
}

#[test]
fn each_id_is_counted_once_and_old_writes_are_not_stored() {
    let (server, scripts) = (Server::start(), Scripts::default());
    let RedisView { mut redis, mut partition, .. } = RedisView::new(&server, &scripts);
    let now_ms = clock::now_ms();
    let mut offset = 0;
    let mut counted = |id: u8, age_hours: i64| {
        let mut batch = Batch::default();
        let headers = pushed(uuid_of(id), None);
        batch.push(&message(b"a", Some(b"1".to_vec()), offset, now_ms - age_hours * HOUR_MS, headers));
        offset += 1;
        server.runtime.block_on(async {
            partition.write(&scripts, &mut redis, &batch, now_ms).await.unwrap();
            let mut counts = redis::cmd("HVALS");
            let counts: Vec<i64> = counts.arg(&partition.keys.id_counts).query_async(&mut redis).await.unwrap();
            let mut ids = redis::cmd("KEYS");
            let ids: Vec<String> = ids.arg("test:*:id:*").query_async(&mut redis).await.unwrap();
            (counts.iter().sum::<i64>(), ids.len())
        })
    };
    assert_eq!(counted(1, 49), (0, 0), "its duplicates would be two days old");
    assert_eq!(counted(1, 47), (1, 1));
    assert_eq!(counted(1, 30), (1, 1), "a duplicate has the same id");
    assert_eq!(counted(2, 0), (2, 2));
    assert_eq!(counted(2, 0), (2, 2));
}
