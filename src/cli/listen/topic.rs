//! Prints the records of a topic.

use std::time::Duration;

use clap::Args;
use postrider_config::Loaded;
use postrider_kafka::{
    Config,
    tail::{Start, Tail, TailError},
};
use postrider_time::clock;
use tokio::sync::mpsc;

use super::{
    super::{kafka_wait::KafkaWait, number, text::note},
    End, Error, Lines,
    record::as_json,
};
use crate::roles::Settings;

pub const EXAMPLES: &str = "\
Each line has topic, partition, offset, timestamp, headers, key (or key_base64) and value (or value_text if it is no JSON, value_base64 if it is no text; none for a tombstone). It joins no consumer group and commits nothing. It reads the partitions that the topic has at the start; after partitions are added, start it again. The address and the security settings of Kafka come from the configuration (kafka.brokers, …).

Examples:
  postrider listen topic my-topic                      new ones, until Ctrl-C
  postrider listen topic my-topic --from beginning --exit-at-end
  postrider listen topic my-topic --from 10m --count 1
  postrider listen topic my-topic --partition 0 --from 41";

#[derive(Args)]
pub struct Topic {
    /// Topic to read (full name)
    topic: String,
    /// Where to start: `beginning`, `end`, an offset, a time (2026-01-31T12:00:00Z) or an age (90s,
    /// 15m, 2h)
    #[arg(long, default_value = "end", value_name = "POSITION")]
    from: String,
    /// Read only this partition
    #[arg(long, value_parser = number::partition, allow_negative_numbers = true)]
    partition: Option<i32>,
    #[command(flatten)]
    pub end: End,
    /// End at the records that the topic has when the command starts
    #[arg(long, help_heading = "End")]
    exit_at_end: bool,
    #[command(flatten)]
    wait: KafkaWait,
}

/// The error of a position to start from.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is none of beginning, end, an offset, a time such as 2026-01-31T12:00:00Z, and an age such as 15m")]
pub struct FromError(String);

fn start(text: &str) -> Result<Start, FromError> {
    match text {
        "beginning" => return Ok(Start::Beginning),
        "end" => return Ok(Start::End),
        _ => {}
    }
    if let Ok(offset) = text.parse::<u64>() {
        return Ok(Start::Offset(i64::try_from(offset).unwrap_or(i64::MAX)));
    }
    let since = postrider_dlq::parse_since(text, clock::now_ms());
    since.map(Start::TimeMs).map_err(|_| FromError(text.to_owned()))
}

impl Topic {
    pub async fn follow(&self, loaded: Loaded<Settings>, mut lines: Lines) -> Result<(), Error> {
        let start = start(&self.from)?;
        self.wait.check(&loaded).await?;
        let kafka = loaded.settings.kafka;
        let (topic, partition, exit_at_end) = (self.topic.clone(), self.partition, self.exit_at_end);
        let (sender, mut receiver) = mpsc::channel(1_000);
        // Ends soon after the receiver is dropped. The thread is not waited for: a client may take
        // long to end.
        std::thread::spawn(move || {
            let read = read(&kafka, &topic, partition, start, exit_at_end, &sender);
            if let Err(error) = read {
                let _ = sender.blocking_send(Err(error));
            }
        });
        if !self.exit_at_end {
            note(&format!("listening to {} from {}", self.topic, self.from));
        }
        while let Some(record) = receiver.recv().await {
            if lines.print(&record?)?.is_break() {
                break;
            }
        }
        Ok(())
    }
}

/// Sends every record, as JSON, until the end or until nobody receives them.
fn read(
    kafka: &Config,
    topic: &str,
    partition: Option<i32>,
    start: Start,
    exit_at_end: bool,
    sender: &mpsc::Sender<Result<String, TailError>>,
) -> Result<(), TailError> {
    let mut tail = Tail::open(kafka, topic, partition, start)?;
    loop {
        if sender.is_closed() || (exit_at_end && tail.is_at_end()) {
            return Ok(());
        }
        // A record can always be written as JSON; a line that cannot is left out.
        let line = tail.next(Duration::from_millis(100), |record| as_json(record).unwrap_or_default())?;
        if let Some(line) = line
            && sender.blocking_send(Ok(line)).is_err()
        {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_a_word_an_offset_a_time_or_an_age() {
        assert_eq!(start("beginning").unwrap(), Start::Beginning);
        assert_eq!(start("41").unwrap(), Start::Offset(41));
        assert_eq!(start("2026-01-31T12:00:00Z").unwrap(), Start::TimeMs(1_769_860_800_000));
        assert!(matches!(start("15m").unwrap(), Start::TimeMs(ms) if ms > 1_769_860_800_000));
        for wrong in ["", "start", "-1", "15x"] {
            assert!(start(wrong).is_err(), "{wrong}");
        }
    }
}
