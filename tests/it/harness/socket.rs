//! A WebSocket client, based on `tokio-tungstenite`.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::http::HeaderValue;
use futures_util::{SinkExt, StreamExt, stream::SplitSink};
use serde_json::Value;
use tokio::{net::TcpStream, task::JoinHandle};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{Error, Message, client::IntoClientRequest, protocol::CloseFrame},
};

use super::wait::until_now;

pub type Inner = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// The frames and events received so far.
#[derive(Debug, Default, Clone)]
pub struct Seen {
    pub frames: Vec<String>,
    pub pings: usize,
    /// Code and reason of the server's close frame.
    pub close: Option<(u16, String)>,
    pub ended: bool,
}

impl Seen {
    pub fn json(&self) -> Vec<Value> {
        self.frames.iter().map(|frame| serde_json::from_str(frame).unwrap()).collect()
    }

    /// Returns the messages in frames of the subprotocol.
    pub fn data(&self) -> Vec<Value> {
        self.json()
            .into_iter()
            .filter(|frame| frame["type"] == "message")
            .map(|mut frame| frame["data"].take())
            .collect()
    }

    /// Returns the cursor of the last message in frames of the subprotocol.
    pub fn cursor(&self) -> Option<String> {
        self.json().iter().rev().find_map(|frame| frame["id"].as_str().map(str::to_owned))
    }
}

/// Connects without reading. Returns the connection and the subprotocol that the server chose.
pub async fn connect(
    api: &str,
    query: &str,
    headers: &[(&'static str, &str)],
) -> Result<(Inner, Option<String>), Error> {
    let url = format!("{}/api/v1/websocket/message{query}", api.replacen("http", "ws", 1));
    let mut request = url.into_client_request()?;
    for (name, value) in headers {
        request.headers_mut().insert(*name, HeaderValue::from_str(value).unwrap());
    }
    let (stream, response) = connect_async(request).await?;
    let protocol = response.headers().get("sec-websocket-protocol").map(|value| value.to_str().unwrap().to_owned());
    Ok((stream, protocol))
}

/// A connection whose frames are read and whose pings are answered. Drop breaks it without a close
/// frame.
pub struct Socket {
    seen: Arc<Mutex<Seen>>,
    reader: JoinHandle<()>,
    sink: SplitSink<Inner, Message>,
    pub protocol: Option<String>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Socket {
    /// Connects without a subprotocol, with the receiver in a header.
    pub async fn plain(api: &str, receiver: &str) -> Self {
        Self::try_open(api, "", &[("ReceiverId", receiver)]).await.unwrap()
    }

    /// Connects with the subprotocol and the receiver in the query, after a cursor unless it is
    /// empty.
    pub async fn cursors(api: &str, receiver: &str, after: &str) -> Self {
        Self::try_cursors(api, receiver, after).await.unwrap()
    }

    pub async fn try_cursors(api: &str, receiver: &str, after: &str) -> Result<Self, Error> {
        let query = format!("?receiverId={receiver}&after={after}");
        Self::try_open(api, &query, &[("Sec-WebSocket-Protocol", "other, postrider.v1")]).await
    }

    pub async fn try_open(api: &str, query: &str, headers: &[(&'static str, &str)]) -> Result<Self, Error> {
        let connect = tokio::time::timeout(Duration::from_secs(10), connect(api, query, headers));
        let (stream, protocol) = connect.await.map_err(|_| Error::ConnectionClosed)??;
        let (sink, mut frames) = stream.split();
        let seen = Arc::<Mutex<Seen>>::default();
        let shared = seen.clone();
        let reader = tokio::spawn(async move {
            while let Some(Ok(frame)) = frames.next().await {
                let mut seen = shared.lock().unwrap();
                match frame {
                    Message::Text(text) => seen.frames.push(text.to_string()),
                    Message::Ping(_) => seen.pings += 1,
                    Message::Close(Some(CloseFrame { code, reason })) => {
                        seen.close = Some((code.into(), reason.to_string()));
                    }
                    Message::Close(None) => {}
                    other => panic!("{other:?}"),
                }
            }
            shared.lock().unwrap().ended = true;
        });
        Ok(Self { seen, reader, sink, protocol })
    }

    pub fn seen(&self) -> Seen {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn count(&self) -> usize {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).frames.len()
    }

    /// Waits for this many frames. More of them are a failure.
    pub async fn frames(&self, count: usize) -> Seen {
        let what = format!("{count} frames");
        until_now(&what, Duration::from_secs(30), || (self.count() >= count).then_some(())).await;
        let seen = self.seen();
        assert_eq!(seen.frames.len(), count, "{seen:?}");
        seen
    }

    /// Waits until the server closes the connection, and returns code and reason.
    pub async fn closed(&self) -> (u16, String) {
        until_now("it is closed", Duration::from_secs(20), || self.seen().close.filter(|_| self.seen().ended)).await
    }

    pub async fn say(&mut self, text: &str) {
        self.sink.send(Message::text(text)).await.unwrap();
    }

    /// Closes the connection with a close frame and waits for the server's.
    pub async fn leave(mut self) {
        let _ = self.sink.send(Message::Close(None)).await;
        until_now("the close is answered", Duration::from_secs(5), || self.seen().ended.then_some(())).await;
    }
}
