//! A client for server-sent events.

use std::sync::{Arc, Mutex, PoisonError};

use futures_util::StreamExt;
use reqwest::Response;
use serde_json::Value;
use tokio::task::JoinHandle;

use super::{Answer, App};

/// The events received so far.
#[derive(Debug, Default, Clone)]
pub struct Seen {
    /// The `id` and `data` of each event.
    pub events: Vec<(String, Value)>,
    /// The id to resume after.
    pub last_id: String,
    pub heartbeats: usize,
    pub ended: bool,
}

impl Seen {
    pub fn texts(&self) -> Vec<&str> {
        self.events.iter().map(|(_, data)| data["text"].as_str().unwrap()).collect()
    }

    /// Parses one block of lines.
    fn take(&mut self, block: &str) {
        let mut data: Option<String> = None;
        for line in block.lines() {
            match line.split_once(": ") {
                Some(("id", id)) => self.last_id = id.to_owned(),
                Some(("data", line)) => {
                    data.get_or_insert_default().push_str(line);
                }
                Some(("", _)) => self.heartbeats += 1,
                // The event type is in the data as well.
                Some(("retry" | "event", _)) => {}
                other => panic!("{other:?}: {line}"),
            }
        }
        if let Some(data) = data {
            self.events.push((self.last_id.clone(), serde_json::from_str(&data).unwrap()));
        }
    }
}

/// A stream that is being read. Drop closes the connection.
pub struct Stream {
    seen: Arc<Mutex<Seen>>,
    reader: JoinHandle<()>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Stream {
    /// Opens a stream after an id, or from now on if the id is empty.
    pub async fn open(app: &App, path: &str, after: &str) -> Self {
        Self::try_open(&app.client, &app.api, path, after).await.unwrap_or_else(|answer| panic!("{answer:?}"))
    }

    /// Opens a stream. Returns the response as an error if it is not a stream, and `None` if there
    /// was none.
    pub async fn try_open(
        client: &reqwest::Client,
        api: &str,
        path: &str,
        after: &str,
    ) -> Result<Self, Option<Answer>> {
        let mut request = client.get(format!("{api}{path}")).timeout(std::time::Duration::from_secs(600));
        if !after.is_empty() {
            request = request.header("last-event-id", after);
        }
        let response = request.send().await.map_err(|_| None)?;
        if response.status() != 200 {
            return Err(Answer::read(response).await.ok());
        }
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let seen = Arc::new(Mutex::new(Seen { last_id: after.to_owned(), ..Seen::default() }));
        Ok(Self { reader: tokio::spawn(read(response, seen.clone())), seen })
    }

    /// Returns the number of events so far.
    pub fn count(&self) -> usize {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).events.len()
    }

    /// Returns what was received, without the first `from` events.
    pub fn since(&self, from: usize) -> Seen {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        Seen { events: seen.events[from..].to_vec(), last_id: seen.last_id.clone(), ..*seen }
    }

    pub fn seen(&self) -> Seen {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn read(response: Response, seen: Arc<Mutex<Seen>>) {
    let mut chunks = response.bytes_stream();
    let mut text = Vec::new();
    while let Some(Ok(chunk)) = chunks.next().await {
        text.extend_from_slice(&chunk);
        while let Some(end) = text.windows(2).position(|two| two == b"\n\n") {
            let block: Vec<u8> = text.drain(..end + 2).collect();
            seen.lock().unwrap().take(std::str::from_utf8(&block).unwrap().trim_end());
        }
    }
    seen.lock().unwrap().ended = true;
}
