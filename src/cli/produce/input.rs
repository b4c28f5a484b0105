//! Reads the records to write, from arguments or stdin.

use std::{
    collections::BTreeMap,
    io::{self, BufRead},
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{
    Deserializer, Value, json,
    value::{RawValue, to_raw_value},
};
use tokio::{sync::mpsc, time::timeout};

use super::{Format, Record};

/// Limits of one request: records, and bytes of them. A body may have 1 MiB by default.
const MAX_RECORDS: usize = 500;
const MAX_BYTES: usize = 512 << 10;
/// Maximum number of records that are read ahead.
const READ_AHEAD: usize = 1_000;
/// Wait for a record that says that not all were sent.
const MORE_TIMEOUT: Duration = Duration::from_millis(200);

/// Number of a record in the input, 1 for the first.
pub type Number = usize;

/// The reason why the input cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("not JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error("not a JSON object with the fields of a record")]
    NotAnObject,
}

/// Records that go into one request, as JSON, and the error that follows them.
pub struct Batch {
    pub records: Vec<(Number, Box<RawValue>)>,
    pub problem: Option<super::Error>,
}

/// The records of the command. They are read on a thread, so that those that arrive slowly are sent
/// as they arrive.
pub struct Input {
    receiver: mpsc::Receiver<Result<Box<RawValue>, Error>>,
    read: Number,
    /// True if the records come from stdin, which may pause; arguments are all there.
    may_pause: bool,
    /// A record that did not fit into the last batch.
    left: Option<Box<RawValue>>,
}

impl Input {
    pub fn new(values: Vec<String>, common: Record) -> Self {
        let (sender, receiver) = mpsc::channel(READ_AHEAD);
        let may_pause = values.is_empty();
        std::thread::spawn(move || read(values, &common, |record| sender.blocking_send(record).is_ok()));
        Self { receiver, read: 0, may_pause, left: None }
    }

    /// Returns the records that are there, at least one; `None` at the end.
    pub async fn batch(&mut self) -> Option<Batch> {
        let mut batch = Batch { records: Vec::new(), problem: None };
        let mut next = match self.left.take() {
            Some(record) => Ok(record),
            None => {
                self.read += 1;
                self.receiver.recv().await?
            }
        };
        let mut bytes = 0;
        loop {
            match next {
                Ok(record) => {
                    bytes += record.get().len();
                    if bytes > MAX_BYTES && !batch.records.is_empty() {
                        self.left = Some(record);
                        return Some(batch);
                    }
                    batch.records.push((self.read, record));
                }
                Err(source) => {
                    batch.problem = Some(super::Error::Unreadable { number: self.read, source });
                    return Some(batch);
                }
            }
            if batch.records.len() >= MAX_RECORDS {
                return Some(batch);
            }
            let more = if self.may_pause { self.receiver.try_recv().ok() } else { self.receiver.recv().await };
            let Some(more) = more else { return Some(batch) };
            self.read += 1;
            next = more;
        }
    }

    /// Returns whether there are records after the last batch. Of an input that stays open and
    /// silent, none are known.
    pub async fn has_more(&mut self) -> bool {
        self.left.is_some() || matches!(timeout(MORE_TIMEOUT, self.receiver.recv()).await, Ok(Some(_)))
    }
}

/// Passes every record to `take` until it returns false or the input cannot be read.
fn read(values: Vec<String>, common: &Record, mut take: impl FnMut(Result<Box<RawValue>, Error>) -> bool) {
    let stdin = io::stdin().lock();
    match (values.is_empty(), common.format) {
        (false, format) => {
            for value in values {
                let record = match format {
                    Format::Lines => line(value.as_bytes(), common),
                    Format::Json => parse(&value).and_then(|value| payload(value, common)),
                    Format::Ndjson => parse(&value).and_then(|fields| filled(fields, common)),
                };
                if !take(record) {
                    return;
                }
            }
        }
        (true, Format::Lines) => read_lines(stdin, common, take),
        (true, Format::Json) => read_values(stdin, |value| payload(value, common), take),
        (true, Format::Ndjson) => read_values(stdin, |fields| filled(fields, common), take),
    }
}

fn parse<T: for<'a> Deserialize<'a>>(text: &str) -> Result<T, Error> {
    Ok(serde_json::from_str(text)?)
}

fn read_lines(mut stdin: impl BufRead, common: &Record, mut take: impl FnMut(Result<Box<RawValue>, Error>) -> bool) {
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        let record = match stdin.read_until(b'\n', &mut bytes) {
            Ok(0) => return,
            Ok(_) => match bytes.strip_suffix(b"\n").unwrap_or(&bytes) {
                b"" => continue,
                value => line(value, common),
            },
            Err(error) => Err(error.into()),
        };
        let is_last = record.is_err();
        if !take(record) || is_last {
            return;
        }
    }
}

fn read_values<T: DeserializeOwned>(
    stdin: impl BufRead,
    record: impl Fn(T) -> Result<Box<RawValue>, Error>,
    mut take: impl FnMut(Result<Box<RawValue>, Error>) -> bool,
) {
    for value in Deserializer::from_reader(stdin).into_iter::<T>() {
        let record = value.map_err(Error::from).and_then(&record);
        let is_last = record.is_err();
        if !take(record) || is_last {
            return;
        }
    }
}

/// Returns the record of a value that is written as it is.
fn line(value: &[u8], common: &Record) -> Result<Box<RawValue>, Error> {
    let value = to_raw_value(&BASE64_STANDARD.encode(value))?;
    filled(Fields::from([("payload_base64".to_owned(), value)]), common)
}

fn payload(value: Box<RawValue>, common: &Record) -> Result<Box<RawValue>, Error> {
    filled(Fields::from([("payload".to_owned(), value)]), common)
}

/// The fields of a record, as `POST /produce` takes them.
type Fields = BTreeMap<String, Box<RawValue>>;

/// Adds what all records have in common, unless the record has it.
fn filled(mut fields: Fields, common: &Record) -> Result<Box<RawValue>, Error> {
    let Record { key, header, partition, timestamp, .. } = common;
    if fields.is_empty() {
        return Err(Error::NotAnObject);
    }
    let headers: BTreeMap<&str, &str> = header.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let timestamp = timestamp.as_ref().map(|time| time.parse().map_or_else(|_| Value::from(time.as_str()), i64::into));
    for (name, value) in [
        ("key", key.as_ref().filter(|_| !fields.contains_key("key_base64")).map(|key| json!(key))),
        ("headers", (!headers.is_empty()).then(|| json!(headers))),
        ("partition", partition.map(Value::from)),
        ("timestamp", timestamp),
    ] {
        if let Some(value) = value.filter(|_| !fields.contains_key(name)) {
            fields.insert(name.to_owned(), to_raw_value(&value)?);
        }
    }
    Ok(to_raw_value(&fields)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn common(format: Format) -> Record {
        let header = vec![("source".to_owned(), "cli".to_owned())];
        Record { format, key: Some("k".to_owned()), header, partition: Some(1), timestamp: Some("5".to_owned()) }
    }

    fn records(values: &[&str], common: &Record) -> Vec<String> {
        let mut found = Vec::new();
        read(values.iter().map(|value| (*value).to_owned()).collect(), common, |record| {
            found.push(record.map_or_else(|error| format!("error: {error}"), |record| record.get().to_owned()));
            true
        });
        found
    }

    #[test]
    fn options_fill_in_what_a_record_lacks_and_json_stays_as_written() {
        assert_eq!(
            records(&["1e3"], &common(Format::Json)),
            [r#"{"headers":{"source":"cli"},"key":"k","partition":1,"payload":1e3,"timestamp":5}"#]
        );
        let own =
            r#"{"key":"own","payload":{"b":1,"a":2},"headers":{},"partition":0,"timestamp":"2026-01-01T00:00:00Z"}"#;
        assert_eq!(
            records(&[own], &common(Format::Ndjson)),
            [r#"{"headers":{},"key":"own","partition":0,"payload":{"b":1,"a":2},"timestamp":"2026-01-01T00:00:00Z"}"#]
        );
    }

    #[tokio::test]
    async fn arguments_are_sent_together() {
        for _ in 0..20 {
            let values: Vec<String> = (0..MAX_RECORDS + 1).map(|number| number.to_string()).collect();
            let mut input = Input::new(values, common(Format::Lines));
            for expected in [MAX_RECORDS, 1] {
                assert_eq!(input.batch().await.unwrap().records.len(), expected);
            }
            assert!(input.batch().await.is_none());
        }
    }

    #[test]
    fn values_that_are_no_json_are_refused_where_json_is_asked_for() {
        let plain = |format| Record { format, key: None, header: Vec::new(), partition: None, timestamp: None };
        assert_eq!(records(&["hi"], &plain(Format::Lines)), [r#"{"payload_base64":"aGk="}"#]);
        assert!(records(&["hi"], &plain(Format::Json))[0].starts_with("error: not JSON"));
        assert!(records(&["{}"], &plain(Format::Ndjson))[0].starts_with("error: not a JSON object"));
    }
}
