//! Implements `postrider lag`: shows the lag of every partition and the record that blocks it.

use std::{collections::HashMap, sync::Arc, time::Duration};

use axum::http::StatusCode;
use clap::Args;
use postrider_config::Loaded;
use postrider_kafka::{Config, lag, reach::Unreachable};
use postrider_time::clock;
use rdkafka::error::KafkaError;
use serde::Serialize;
use serde_json::Value;

use super::{
    api::{self, Api},
    block_on,
    kafka_wait::KafkaWait,
    progress::Progress,
    running::local_addresses,
    text::{self, Output, columns, note},
};
use crate::roles::{ConsumerPlan, Settings};

pub const EXAMPLES: &str = "\
COMMITTED is the commit point: the lowest unfinished offset of the partition. KEY and AGE describe that record. HELD shows for how long its process has been working on it, how often it failed and why; this needs a process that answers at its management port.

Examples:
  postrider lag                                    every configured consumer
  postrider lag --topic my-topic --group my-group  any other consumer group
  postrider lag --management http://10.0.0.7:9090  fill HELD from this process
  watch postrider lag                              refresh every two seconds";

/// Wait of a process for the answer of its management port.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Args)]
pub struct Command {
    /// Show only this consumer group (full name); for a group outside this configuration, add
    /// --topic
    #[arg(long, help_heading = "Selection")]
    group: Option<String>,
    /// Show only this topic (full name)
    #[arg(long, help_heading = "Selection")]
    topic: Option<String>,
    /// Management address of a running process; repeatable [default: the configured address, on
    /// this machine]
    #[arg(long, env = "MANAGEMENT_URL", value_name = "URL", value_delimiter = ',')]
    management: Vec<String>,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    wait: KafkaWait,
}

/// The reason why the lag cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no configured consumer matches (groups: {groups}); pass --group and --topic")]
    NoConsumer { groups: String },
    #[error(transparent)]
    Unreachable(#[from] Unreachable),
    #[error("kafka: {0}")]
    Kafka(#[from] KafkaError),
    #[error("the lookup ended early")]
    Ended,
    #[error(transparent)]
    Api(#[from] api::Error),
    #[error(transparent)]
    Print(#[from] text::Error),
}

#[derive(Serialize)]
struct Row {
    consumer: String,
    group: String,
    topic: String,
    partition: i32,
    committed: Option<i64>,
    end: i64,
    lag: i64,
    /// Offset of the lowest unfinished record.
    oldest_offset: Option<i64>,
    oldest_key: Option<String>,
    oldest_age_seconds: Option<f64>,
    /// The blocking record, as the process that owns the partition reports it.
    holder: Option<Value>,
    paused: Option<bool>,
}

/// Runs the command.
pub fn run(command: &Command, loaded: &Loaded<Settings>) -> Result<(), super::Error> {
    block_on(show(command, loaded))
}

async fn show(command: &Command, loaded: &Loaded<Settings>) -> Result<(), Error> {
    let settings = &loaded.settings;
    let consumers = command.consumers(settings)?;
    command.wait.check(loaded).await?;
    let progress = Progress::new();
    progress.show("asking running processes");
    let processes: Vec<Api> =
        command.addresses(settings).iter().map(|url| Api::of_management(url)).collect::<Result<_, _>>()?;
    let (holders, silent) = ask_processes(&processes).await;
    let holders = Arc::new(holders);
    let (mut rows, mut notes) = (Vec::new(), Notes { silent, ..Notes::default() });
    for (number, consumer) in consumers.iter().enumerate() {
        progress.show(&format!("measuring {} ({} of {})", consumer.group, number + 1, consumers.len()));
        let (kafka, plan, holders) = (settings.kafka.clone(), consumer.clone(), holders.clone());
        let found = tokio::task::spawn_blocking(move || measure(&kafka, &plan, &holders)).await;
        let found = found.map_err(|_| Error::Ended)??;
        if found.is_empty() {
            notes.missing.push(consumer.clone());
        } else if is_unused(consumer, settings) && found.iter().all(|row| row.committed.is_none()) {
            notes.unused.push(consumer.group.clone());
        } else {
            rows.extend(found);
        }
    }
    drop(progress);
    command.output.print(&rows, |rows| table(rows))?;
    notes.print();
    Ok(())
}

/// Returns whether processes with this configuration do not run the consumer.
fn is_unused(consumer: &ConsumerPlan, settings: &Settings) -> bool {
    consumer.needs_postgres && settings.postgres.url.is_empty()
}

/// Notes on groups that the rows do not show.
#[derive(Default)]
struct Notes {
    /// Consumers of topics that do not exist.
    missing: Vec<ConsumerPlan>,
    /// Groups that need Postgres and have never committed, while it is not configured.
    unused: Vec<String>,
    /// Addresses at which no process answered.
    silent: Vec<String>,
}

impl Notes {
    fn print(&self) {
        for ConsumerPlan { topic, group, .. } in &self.missing {
            note(&format!("topic {topic} of group {group} does not exist"));
        }
        if !self.unused.is_empty() {
            note(&format!(
                "not shown: {}. These groups need Postgres, `postgres.url` is not set here, and they have committed nothing",
                self.unused.join(", ")
            ));
        }
        for address in &self.silent {
            note(&format!("no process answers at {address}, HELD is incomplete; pass --management"));
        }
    }
}

impl Command {
    fn consumers(&self, settings: &Settings) -> Result<Vec<ConsumerPlan>, Error> {
        let ours = ConsumerPlan::all(settings);
        let wanted = |plan: &&ConsumerPlan| {
            self.group.as_ref().is_none_or(|group| *group == plan.group)
                && self.topic.as_ref().is_none_or(|topic| *topic == plan.topic)
        };
        let chosen: Vec<ConsumerPlan> = ours.iter().filter(wanted).cloned().collect();
        match (chosen.is_empty(), &self.group, &self.topic) {
            (false, ..) => Ok(chosen),
            (true, Some(group), Some(topic)) => {
                Ok(vec![ConsumerPlan { name: "-", topic: topic.clone(), group: group.clone(), needs_postgres: false }])
            }
            _ => {
                let groups = ours.iter().map(|plan| plan.group.as_str()).collect::<Vec<_>>().join(", ");
                Err(Error::NoConsumer { groups })
            }
        }
    }

    fn addresses(&self, settings: &Settings) -> Vec<String> {
        let given: Vec<String> = self.management.iter().filter(|address| !address.is_empty()).cloned().collect();
        if given.is_empty() { local_addresses(settings) } else { given }
    }
}

/// Maps group, topic and partition to the report of the process that owns the partition.
type Holders = HashMap<(String, String, i64), Value>;

/// Queries every address. Returns the reports and the addresses that did not answer.
async fn ask_processes(processes: &[Api]) -> (Holders, Vec<String>) {
    let (mut holders, mut silent) = (Holders::new(), Vec::new());
    for process in processes {
        let Some(consumers) = fetch(process).await else {
            silent.push(process.shown());
            continue;
        };
        for consumer in consumers.as_array().into_iter().flatten() {
            let text = |name: &str| consumer[name].as_str().unwrap_or_default().to_owned();
            for partition in consumer["partitions"].as_array().into_iter().flatten() {
                let number = partition["partition"].as_i64().unwrap_or(-1);
                holders.insert((text("group"), text("topic"), number), partition.clone());
            }
        }
    }
    (holders, silent)
}

async fn fetch(api: &Api) -> Option<Value> {
    let answer = tokio::time::timeout(ANSWER_TIMEOUT, api.get("/consumers")).await.ok()?.ok()?;
    Some(answer.expect(StatusCode::OK, "consumers").ok()?.json())
}

fn measure(kafka: &Config, consumer: &ConsumerPlan, holders: &Holders) -> Result<Vec<Row>, Error> {
    let ConsumerPlan { name, topic, group, .. } = consumer;
    let found = lag::of_group(kafka, topic, group)?;
    let row = |partition: lag::PartitionLag| {
        let said = holders.get(&(group.clone(), topic.clone(), i64::from(partition.partition)));
        let age_s = |oldest: &lag::Oldest| (clock::now_ms() - oldest.timestamp_ms).max(0) as f64 / 1e3;
        Row {
            consumer: (*name).to_owned(),
            group: group.clone(),
            topic: topic.clone(),
            partition: partition.partition,
            committed: partition.committed,
            end: partition.end,
            lag: partition.lag,
            oldest_offset: partition.oldest.as_ref().map(|oldest| oldest.offset),
            oldest_age_seconds: partition.oldest.as_ref().map(age_s),
            oldest_key: partition.oldest.and_then(|oldest| oldest.key),
            holder: said.map(|said| said["holder"].clone()).filter(|holder| !holder.is_null()),
            paused: said.and_then(|said| said["paused"].as_bool()),
        }
    };
    Ok(found.unwrap_or_default().into_iter().map(row).collect())
}

fn table(rows: &[Row]) -> String {
    let head = ["GROUP", "TOPIC", "PARTITION", "COMMITTED", "END", "LAG", "AGE", "KEY", "HELD"].map(str::to_owned);
    let cells = rows.iter().map(|row| {
        [
            row.group.clone(),
            row.topic.clone(),
            row.partition.to_string(),
            row.committed.map_or_else(|| "-".to_owned(), |offset| offset.to_string()),
            row.end.to_string(),
            row.lag.to_string(),
            row.oldest_age_seconds.map_or_else(|| "-".to_owned(), |age| format!("{age:.0} s")),
            row.oldest_key.clone().unwrap_or_else(|| "-".to_owned()),
            held(row),
        ]
    });
    columns(std::iter::once(head).chain(cells).collect())
}

fn held(row: &Row) -> String {
    let paused = if row.paused == Some(true) { "paused, " } else { "" };
    match &row.holder {
        None => if paused.is_empty() { "-" } else { "paused" }.to_owned(),
        Some(holder) => {
            let (seconds, attempts) = (holder["held_for_seconds"].as_f64().unwrap_or(0.0), &holder["attempts"]);
            let error = holder["error"].as_str().filter(|error| !error.is_empty());
            let why = error.map_or_else(String::new, |error| format!(", {attempts} failed: {error}"));
            format!("{paused}offset {} for {seconds:.0} s{why}", holder["offset"])
        }
    }
}
