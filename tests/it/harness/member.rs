//! A consumer in its own process that records its work in a ledger, and a checker of the ledger.
//!
//! The process is this test binary, started again for one ignored test. All members of a test
//! append lines `done PARTITION OFFSET KEY MS MEMBER` to one file. Each line is one write, so the
//! file is in order.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use postrider_health::Health;
use postrider_kafka::{
    Broker, Config, DeadLetters, GroupProtocol, Producer,
    batch::{Batch, Record},
    consumer::{
        Assignment, BatchHandler, Consumers, Delivery, Failure, Keyed, KeyedHandler, Lag, Outcome, Poison, Span,
        Subscription,
    },
};
use postrider_process::drain;
use postrider_time::clock;
use rustix::process::{Pid, Signal, kill_process};
use tokio_util::sync::CancellationToken;

use super::{
    World,
    wait::{seconds, until_now},
};

const VARIABLE: &str = "LANES_MEMBER";

/// One processed record.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Done {
    pub partition: i32,
    pub offset: i64,
    pub key: String,
    pub ms: i64,
    pub member: u32,
}

/// Settings that the members of one group share.
#[derive(Clone)]
pub struct Group {
    pub brokers: String,
    pub topic: String,
    pub name: String,
    /// `keyed` or `batch`.
    pub shape: &'static str,
    /// `classic` or `consumer`.
    pub protocol: &'static str,
    pub ledger: PathBuf,
    /// Members that the test has not stopped.
    running: Arc<Mutex<Vec<Arc<Process>>>>,
}

impl Group {
    pub fn new(world: &World, topic: &str, shape: &'static str, protocol: &'static str) -> Self {
        let ledger = super::app::log_folder().join(format!("{topic}-{shape}-{protocol}.ledger"));
        let _ = std::fs::remove_file(&ledger);
        let (brokers, topic) = (world.kafka.brokers.clone(), topic.to_owned());
        let (name, running) = (format!("{topic}-{shape}-{protocol}"), Arc::default());
        Self { brokers, name, topic, shape, protocol, ledger, running }
    }

    pub fn spawn(&self) -> Member {
        let Self { brokers, topic, name, shape, protocol, ledger, running } = self;
        let plan = [brokers, topic, name, *shape, *protocol, ledger.to_str().unwrap()].join(";");
        let log = ledger.with_extension(format!("{}.log", clock::now_ms()));
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "consumer::a_member", "--ignored", "--nocapture", "--test-threads=1"])
            .env(VARIABLE, plan)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let process = Arc::new(Process { id: child.id(), child: Mutex::new(child), log });
        running.lock().unwrap().push(process.clone());
        Member { process, running: running.clone() }
    }

    pub fn ledger(&self) -> Vec<Done> {
        let text = std::fs::read_to_string(&self.ledger).unwrap_or_default();
        // The last line may be incomplete.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| parse(line).unwrap_or_else(|| panic!("not a line of the ledger: {line}"))).collect()
    }

    /// Waits until this many distinct records are processed. Fails at once if a member ends by
    /// itself.
    pub async fn await_done(&self, count: usize, within: Duration) -> Vec<Done> {
        until_now(&format!("{count} records are done, see {}", self.ledger.display()), within, || {
            self.running.lock().unwrap().iter().for_each(|process| process.assert_runs());
            let ledger = self.ledger();
            let different: BTreeSet<_> = ledger.iter().map(|done| (done.partition, done.offset)).collect();
            (different.len() >= count).then_some(ledger)
        })
        .await
    }
}

fn parse(line: &str) -> Option<Done> {
    let mut words = line.strip_prefix("done ")?.split(' ');
    let mut next = || words.next();
    Some(Done {
        partition: next()?.parse().ok()?,
        offset: next()?.parse().ok()?,
        key: next()?.to_owned(),
        ms: next()?.parse().ok()?,
        member: next()?.parse().ok()?,
    })
}

struct Process {
    id: u32,
    child: Mutex<Child>,
    log: PathBuf,
}

impl Process {
    fn ended(&self) -> Option<ExitStatus> {
        self.child.lock().unwrap().try_wait().unwrap()
    }

    fn assert_runs(&self) {
        let Some(status) = self.ended() else { return };
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        panic!("member {} ended by itself, {status}; {} has:\n{log}", self.id, self.log.display());
    }
}

/// A running member, killed on drop.
pub struct Member {
    process: Arc<Process>,
    running: Arc<Mutex<Vec<Arc<Process>>>>,
}

impl Member {
    pub fn id(&self) -> u32 {
        self.process.id
    }

    /// Returns the member's log so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.process.log).unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.process.id as i32).unwrap(), signal).unwrap();
    }

    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Kills the member with SIGKILL, by dropping it.
    pub fn kill(self) {}

    /// Sends SIGTERM and fails unless the member exits with success.
    pub async fn leave(self) {
        self.forget();
        self.signal(Signal::TERM);
        let status = until_now("the member leaves", seconds(20), || self.process.ended()).await;
        assert!(status.success(), "{status}, see {}", self.process.log.display());
    }

    /// Allows the member to end from now on.
    fn forget(&self) {
        self.running.lock().unwrap().retain(|process| !Arc::ptr_eq(process, &self.process));
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.forget();
        let mut child = self.process.child.lock().unwrap();
        // The process has usually ended already.
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// A handler that writes each record to the ledger after a short delay.
struct Scribe {
    ledger: Mutex<File>,
}

impl Scribe {
    fn write(&self, partition: i32, record: &Record<'_>) {
        let key = String::from_utf8_lossy(record.key().unwrap_or(b"-"));
        let (offset, ms, member) = (record.offset(), clock::now_ms(), std::process::id());
        let line = format!("done {partition} {offset} {key} {ms} {member}\n");
        self.ledger.lock().unwrap().write_all(line.as_bytes()).unwrap();
    }
}

impl KeyedHandler for Scribe {
    async fn handle(&self, delivery: &Delivery) -> Outcome {
        let record = delivery.record();
        if record.offset() % 97 == 0 && delivery.attempt() == 1 {
            let reason = postrider_kafka::dead_letter::Reason { class: "moody", message: "not yet".into() };
            return Outcome::RetryAfter(Duration::from_millis(60), reason);
        }
        tokio::time::sleep(Duration::from_millis(fastrand::u64(0..4))).await;
        self.write(delivery.partition(), &record);
        Outcome::Done
    }
}

impl BatchHandler for Scribe {
    type Partition = i32;

    async fn assigned(&self, assignment: Assignment) -> Result<(i32, i64), Failure> {
        Ok((assignment.partition, assignment.resume()))
    }

    async fn apply(&self, partition: &mut i32, batch: &Batch) -> Result<Vec<Poison>, Failure> {
        tokio::time::sleep(Duration::from_millis(fastrand::u64(0..20))).await;
        if fastrand::u8(..) < 10 {
            return Err(Failure::Retry("moody".to_owned()));
        }
        batch.iter().for_each(|record| self.write(*partition, &record));
        Ok(Vec::new())
    }
}

/// Returns the consumer runtime of this process, and the producer for dead letters.
pub fn consumers(config: Config, stop: CancellationToken) -> (Consumers, Producer) {
    let health = Health::default();
    let broker = Broker::start(&config, health.check("kafka")).unwrap();
    let producer = Producer::start(&config, broker.clone()).unwrap();
    (Consumers { config, broker, health, stop }, producer)
}

/// Runs a member until SIGTERM, in its own process.
pub async fn live() {
    let Ok(plan) = std::env::var(VARIABLE) else { return };
    let log = tracing_subscriber::fmt().with_env_filter("info,postrider=debug").with_ansi(false);
    log.with_writer(std::io::stderr).init();
    let words: Vec<&str> = plan.split(';').collect();
    let [brokers, topic, group, shape, protocol, ledger] = words[..] else { panic!("{plan}") };
    let mut config = Config { brokers: vec![brokers.to_owned()], ..Config::default() };
    config.consumer.session_timeout_ms = 6_000;
    config.consumer.group_protocol =
        if protocol == "consumer" { GroupProtocol::Consumer } else { GroupProtocol::Classic };
    let stop = CancellationToken::new();
    let mut signals = drain::Signals::listen().unwrap();
    let (consumers, producer) = consumers(config, stop.clone());
    let subscription = Subscription {
        name: "member",
        topic: topic.to_owned(),
        group: group.to_owned(),
        max_batch_records: 50,
        max_batch_bytes: 1 << 20,
        dead_letters: DeadLetters::new(producer, format!("{topic}-letters")),
        lag: Lag::default(),
    };
    let handler = Arc::new(Scribe { ledger: Mutex::new(append(Path::new(ledger))) });
    let keyed = Keyed { concurrency: 32, span: Span { records: 400, bytes: 1 << 20 } };
    let batches = shape == "batch";
    let mut running = tokio::spawn(async move {
        if batches {
            consumers.batches(subscription, handler).await
        } else {
            consumers.keyed(subscription, keyed, handler).await
        }
    });
    tokio::select! {
        ended = &mut running => panic!("the consumer ended by itself: {ended:?}"),
        _ = signals.first() => {}
    }
    stop.cancel();
    running.await.unwrap().unwrap();
}

fn append(path: &Path) -> File {
    OpenOptions::new().create(true).append(true).open(path).unwrap()
}

/// Returns the faults in the processing of records `0..n` of each partition: skipped records, and
/// keys whose records were first processed out of order.
pub fn faults(ledger: &[Done], ends: &BTreeMap<i32, i64>) -> Vec<String> {
    let mut found = Vec::new();
    let (mut seen, mut newest) = (BTreeSet::new(), BTreeMap::new());
    for done in ledger {
        if !seen.insert((done.partition, done.offset)) {
            continue;
        }
        let last = newest.insert((done.partition, &done.key), done.offset);
        if let Some(last) = last.filter(|&last| last > done.offset) {
            found.push(format!("{}@{} of key {} came first after {last}", done.partition, done.offset, done.key));
        }
    }
    for (&partition, &end) in ends {
        let skipped = (0..end).filter(|&offset| !seen.contains(&(partition, offset)));
        found.extend(skipped.map(|offset| format!("{partition}@{offset} was skipped")));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(offset: i64, key: &str) -> Done {
        Done { partition: 0, offset, key: key.to_owned(), ms: offset * 10, member: 1 }
    }

    #[test]
    fn a_skipped_record_and_a_swap_are_found_and_a_redelivery_is_none() {
        let ends = BTreeMap::from([(0, 3)]);
        let good = [done(0, "a"), done(1, "b"), done(0, "a"), done(2, "a")];
        assert!(faults(&good, &ends).is_empty());
        assert_eq!(faults(&good[..3], &ends), ["0@2 was skipped"]);
        let swapped = [done(2, "a"), done(1, "b"), done(0, "a")];
        assert_eq!(faults(&swapped, &ends), ["0@0 of key a came first after 2"]);
    }
}
