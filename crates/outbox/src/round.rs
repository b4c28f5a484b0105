//! One round: sends rows to Kafka, and deletes them from the table once Kafka has them.

use std::{borrow::Cow, collections::HashSet};

use futures_util::future::join_all;
use metrics::counter;
use postrider_kafka::{Outgoing, Producer, Receipt, SendError, event::Event};
use postrider_postgres::query::Error;
use postrider_telemetry::trace_context::TraceContext;
use rdkafka::error::RDKafkaErrorCode;
use sqlx::PgConnection;
use uuid::Uuid;

use super::store::{self, Row};

/// Sends rows to Kafka.
pub struct Sender {
    producer: Producer,
    topic_prefix: String,
    topics: Vec<Topic>,
}

/// A topic that rows may be sent to.
pub struct Topic {
    /// Name before the prefix.
    pub name: &'static str,
    /// Returns the value of a row's record, given the event's id and the row's value, which a
    /// former version of the program may have written.
    pub value: fn(Uuid, &str) -> Cow<'_, str>,
}

/// Result of a round.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Round {
    pub sent: usize,
    /// Number of rows that were not sent this time, with the rows that must come after them.
    pub left: usize,
    /// The reason of the first row that was not sent.
    pub problem: Option<String>,
}

/// Result for one row.
enum Fate {
    Stored,
    /// The row is retried, and so are later rows of the same key.
    Waits(String),
    /// Kafka rejects the row on every attempt.
    Bad(String),
}

impl Sender {
    pub fn new(producer: Producer, topic_prefix: String, topics: Vec<Topic>) -> Self {
        Self { producer, topic_prefix, topics }
    }

    /// Sends rows, in order per shard, and deletes those that Kafka stored.
    pub async fn round(
        &self,
        connection: &mut PgConnection,
        rows: &[Row],
        held: &mut HashSet<String>,
    ) -> Result<Round, Error> {
        let mut sent = Vec::with_capacity(rows.len());
        let mut full = false;
        for row in rows {
            let taken = match row {
                row if held.contains(&row.key) => Err(Fate::Bad(String::new())),
                // Order within a key: no row may overtake one for which the producer was full.
                _ if full => Err(Fate::Waits("the producer is full".to_owned())),
                row => self.send(row),
            };
            if matches!(&taken, Err(Fate::Bad(_))) {
                held.insert(row.key.clone());
            }
            full |= matches!(&taken, Err(Fate::Waits(_)));
            sent.push(taken);
        }
        let fates = join_all(sent.into_iter().zip(rows).map(|(taken, row)| async move {
            match taken {
                Ok(receipt) => receipt.stored(&row.topic).await.map_or_else(fate, |_| Fate::Stored),
                Err(fate) => fate,
            }
        }));
        self.settle(connection, rows, fates.await, held).await
    }

    fn send(&self, row: &Row) -> Result<Receipt, Fate> {
        let topic = self.topics.iter().find(|topic| topic.name == row.topic);
        let Some(Topic { value, .. }) = topic else {
            return Err(Fate::Bad(format!("`{}` is not a topic of the outbox", row.topic)));
        };
        let id = Uuid::try_parse(&row.event_id).map_err(|error| Fate::Bad(error.to_string()))?;
        let given = row.traceparent.as_deref().and_then(|given| TraceContext::parse(given.as_bytes()));
        let trace = given.unwrap_or_else(TraceContext::root);
        let event = Event { id, kind: &row.kind, source: &row.source, trace };
        let (topic, value) = (format!("{}{}", self.topic_prefix, row.topic), value(id, &row.value));
        let record = Outgoing {
            topic: &topic,
            key: Some(row.key.as_bytes()),
            payload: Some(value.as_bytes()),
            headers: Some(event.headers(0)),
            ..Outgoing::default()
        };
        self.producer.send(record).map_err(fate)
    }

    async fn settle(
        &self,
        connection: &mut PgConnection,
        rows: &[Row],
        fates: Vec<Fate>,
        held: &mut HashSet<String>,
    ) -> Result<Round, Error> {
        let (mut round, mut stored, mut waiting) = (Round::default(), Vec::with_capacity(rows.len()), HashSet::new());
        for (row, fate) in rows.iter().zip(fates) {
            match fate {
                // The row is sent again after the earlier one, so that the newest record of a key
                // stays the last.
                Fate::Stored if waiting.contains(row.key.as_str()) => round.left += 1,
                Fate::Stored => stored.push(row),
                Fate::Waits(problem) => {
                    waiting.insert(row.key.as_str());
                    round.left += 1;
                    round.problem.get_or_insert(problem);
                }
                Fate::Bad(_) if waiting.contains(row.key.as_str()) => round.left += 1,
                Fate::Bad(reason) => {
                    let reason = Some(reason).filter(|reason| !reason.is_empty());
                    if let Some(reason) = &reason {
                        tracing::error!(outbox.id = row.id, key = row.key, reason, "outbox row quarantined");
                    }
                    if store::quarantine(connection, row, reason.as_deref()).await? {
                        held.insert(row.key.clone());
                    } else {
                        // The earlier rows were released: this row follows them in the next round.
                        held.remove(&row.key);
                        waiting.insert(row.key.as_str());
                        round.left += 1;
                    }
                }
            }
        }
        round.sent = stored.len();
        store::forget(connection, &stored).await?;
        counter!("postrider_outbox_sent_total").increment(round.sent as u64);
        Ok(round)
    }
}

fn fate(error: SendError) -> Fate {
    match error {
        SendError::TooLarge { .. }
        | SendError::Rejected(RDKafkaErrorCode::InvalidRecord | RDKafkaErrorCode::InvalidMessage) => {
            Fate::Bad(error.to_string())
        }
        error => Fate::Waits(error.to_string()),
    }
}
