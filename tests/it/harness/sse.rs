//! Server-sent events, read as a browser does.

use std::sync::{Arc, Mutex, PoisonError};

use futures_util::StreamExt;
use reqwest::Response;
use serde_json::Value;
use tokio::task::JoinHandle;

use super::{Answer, App};

/// What a stream has brought.
#[derive(Debug, Default, Clone)]
pub struct Seen {
    /// The `data` of each event, with the `id` before its end.
    pub events: Vec<(String, Value)>,
    /// From where to resume.
    pub last_id: String,
    pub heartbeats: usize,
    pub ended: bool,
}

impl Seen {
    pub fn texts(&self) -> Vec<&str> {
        self.events.iter().map(|(_, data)| data["text"].as_str().unwrap()).collect()
    }

    /// Takes one block of lines.
    fn take(&mut self, block: &str) {
        let mut data: Option<String> = None;
        for line in block.lines() {
            match line.split_once(": ") {
                Some(("id", id)) => self.last_id = id.to_owned(),
                Some(("data", line)) => {
                    data.get_or_insert_default().push_str(line);
                }
                Some(("", _)) => self.heartbeats += 1,
                // What an event is called is in its data as well.
                Some(("retry" | "event", _)) => {}
                other => panic!("{other:?}: {line}"),
            }
        }
        if let Some(data) = data {
            self.events.push((self.last_id.clone(), serde_json::from_str(&data).unwrap()));
        }
    }
}

/// A stream that is being read. Dropping it closes the connection.
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
    /// Opens it, after an id or, where that is empty, from now on.
    pub async fn open(app: &App, path: &str, after: &str) -> Self {
        Self::try_open(&app.client, &app.api, path, after).await.unwrap_or_else(|answer| panic!("{answer:?}"))
    }

    /// An answer that is not a stream is an error; `None` when there was no answer.
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

    /// Events so far.
    pub fn count(&self) -> usize {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).events.len()
    }

    /// The same without the first events.
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
