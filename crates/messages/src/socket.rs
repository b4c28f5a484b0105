//! Serves one WebSocket: plain, where every frame is a message, or with the subprotocol
//! `postrider.v1`, which adds cursors and acknowledgements.

use std::{sync::Arc, time::Duration};

use axum::extract::ws::{CloseFrame, Message, Utf8Bytes, WebSocket, close_code};
use bytes::Bytes;
use futures_util::{FutureExt, SinkExt, StreamExt};
use metrics::counter;
use postrider_identity::Principal;
use serde::Deserialize;
use tokio::time::{Instant, timeout};
use tokio_tungstenite::tungstenite::{Error, error::ProtocolError};

use super::{
    acks::Acks,
    cursor::Cursor,
    follower::{Follower, Step},
    send_queue::Ending,
};

/// The subprotocol with cursors and acknowledgements.
pub const PROTOCOL: &str = "postrider.v1";
/// Close code of a connection whose credential is no longer accepted.
const UNAUTHENTICATED: u16 = 4401;
/// Maximum number of steps sent before incoming frames are read.
const STEPS: usize = 64;
/// Maximum wait for the client's close frame after the server's.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// A WebSocket connection.
pub struct Connection {
    follower: Follower,
    acks: Arc<Acks>,
    cursors: bool,
    principal: Arc<Principal>,
    /// Unanswered ping, with the cursor of the messages sent before it.
    ping: Option<(u32, Cursor)>,
    pings: u32,
    /// True if a message was sent after the last ping.
    unproven: bool,
    /// Start of the current second, and the number of frames received in it.
    frames: (Instant, u32),
}

/// Close code and reason.
struct Close {
    code: u16,
    reason: String,
}

impl Close {
    fn new(code: u16, reason: impl Into<String>) -> Self {
        Self { code, reason: reason.into() }
    }
}

#[derive(Deserialize)]
struct ClientFrame {
    ack: Option<String>,
}

impl Connection {
    /// With `cursors`, the connection uses the subprotocol.
    pub fn new(follower: Follower, acks: Arc<Acks>, cursors: bool, principal: Arc<Principal>) -> Self {
        let frames = (Instant::now(), 0);
        Self { follower, acks, cursors, principal, ping: None, pings: 0, unproven: false, frames }
    }

    /// Serves the connection until it ends.
    pub async fn run(mut self, mut socket: WebSocket) {
        let principal = self.principal.clone();
        let close = tokio::select! {
            close = self.serve(&mut socket) => close.err().flatten(),
            // Also while a frame waits for the client to read: what follows would not be its to see.
            () = principal.ended() => Some(Close::new(UNAUTHENTICATED, "the credential has expired or was revoked")),
        };
        let _ = timeout(CLOSE_TIMEOUT, async {
            if let Some(Close { code, reason }) = close {
                counter!("postrider_messages_closed_connections_total", "code" => code.to_string()).increment(1);
                socket.send(Message::Close(Some(CloseFrame { code, reason: reason.into() }))).await?;
            }
            // The library completes the closing handshake while frames are read.
            while socket.next().await.is_some_and(|frame| frame.is_ok()) {}
            Ok::<_, axum::Error>(())
        })
        .await;
    }

    /// Serves until an error: the close to send, or `None` if the client has disconnected.
    async fn serve(&mut self, socket: &mut WebSocket) -> Result<(), Option<Close>> {
        loop {
            let more = self.send_some(socket).await?;
            let queue = self.follower.subscription.queue.clone();
            if more {
                // Incoming frames are handled even while there is always more to send.
                while let Some(frame) = socket.next().now_or_never() {
                    self.handle(frame)?;
                }
                continue;
            }
            tokio::select! {
                () = queue.woken() => {}
                frame = socket.next() => self.handle(frame)?,
            }
        }
    }

    /// Sends pending steps, up to `STEPS`. Returns true if there may be more.
    async fn send_some(&mut self, socket: &mut WebSocket) -> Result<bool, Option<Close>> {
        let (mut sent, mut more) = (0, true);
        while sent < STEPS {
            let Some(step) = self.follower.step().await else {
                more = false;
                break;
            };
            let message = match step {
                Step::End(Ending::Stop { retry_after_ms }) => {
                    return Err(Some(Close::new(close_code::AWAY, format!("retry_after_ms={retry_after_ms}"))));
                }
                Step::End(Ending::Idle) => return Err(Some(Close::new(close_code::POLICY, "no answer to pings"))),
                Step::Ping => Some(self.next_ping()),
                Step::Gap => self.cursors.then(|| Message::Text(Utf8Bytes::from_static(r#"{"type":"gap"}"#))),
                Step::Message(value) => {
                    self.unproven = true;
                    counter!("postrider_messages_delivered_total").increment(1);
                    Some(Message::Text(if self.cursors { self.wrap(&value) } else { value }))
                }
            };
            let Some(message) = message else { continue };
            self.in_time(socket.feed(message)).await?;
            sent += 1;
        }
        if self.unproven && self.ping.is_none() && !self.cursors {
            let ping = self.next_ping();
            self.in_time(socket.feed(ping)).await?;
            sent += 1;
        }
        if sent > 0 {
            self.in_time(socket.flush()).await?;
        }
        Ok(more)
    }

    async fn in_time(&self, sending: impl Future<Output = Result<(), axum::Error>>) -> Result<(), Option<Close>> {
        match timeout(self.follower.subscription.hub.config.write_timeout(), sending).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(None),
            Err(_) => {
                counter!("postrider_messages_slow_connections_total").increment(1);
                Err(Some(Close::new(close_code::AGAIN, "client too slow; resume after the last id")))
            }
        }
    }

    fn wrap(&self, value: &str) -> Utf8Bytes {
        format!(r#"{{"id":"{}","type":"message","data":{value}}}"#, self.follower.cursor).into()
    }

    /// Returns the next ping. Its pong proves that everything sent before it has arrived. An
    /// unanswered ping is repeated with the same number, because otherwise the pong of a client
    /// slower than the ping interval would never count.
    fn next_ping(&mut self) -> Message {
        if self.ping.is_none() {
            self.pings = self.pings.wrapping_add(1);
            self.ping = Some((self.pings, self.follower.cursor.clone()));
            self.unproven = false;
        }
        Message::Ping(Bytes::copy_from_slice(&self.pings.to_be_bytes()))
    }

    fn handle(&mut self, frame: Option<Result<Message, axum::Error>>) -> Result<(), Option<Close>> {
        let frame = frame.ok_or(None)?.map_err(|error| explain(&error))?;
        self.follower.subscription.queue.heard();
        self.count_frame()?;
        match frame {
            Message::Close(_) => Err(None),
            Message::Pong(payload) => {
                self.pong(&payload);
                Ok(())
            }
            Message::Text(text) if self.cursors => self.acknowledge(&text),
            Message::Binary(_) if self.cursors => {
                Err(Some(Close::new(close_code::UNSUPPORTED, "send text frames with JSON")))
            }
            // Frames of plain clients have no meaning.
            Message::Text(_) | Message::Binary(_) | Message::Ping(_) => Ok(()),
        }
    }

    fn pong(&mut self, payload: &[u8]) {
        let answered = self.ping.take_if(|(number, _)| number.to_be_bytes() == payload);
        if let Some((_, cursor)) = answered.filter(|_| !self.cursors) {
            self.acks.add(&self.follower.subscription.receiver, &cursor);
            if self.unproven {
                // Wakes the loop, which sends the next ping.
                self.follower.subscription.queue.wake();
            }
        }
    }

    fn acknowledge(&mut self, text: &str) -> Result<(), Option<Close>> {
        let wrong = || Some(Close::new(close_code::INVALID, r#"expected {"ack":cursor}"#));
        let frame: ClientFrame = serde_json::from_str(text).map_err(|_| wrong())?;
        // Ignores other fields, which a later version may define.
        let Some(ack) = frame.ack else { return Ok(()) };
        let cursor: Cursor = ack.parse().map_err(|_| wrong())?;
        self.acks.add(&self.follower.subscription.receiver, &cursor.within(&self.follower.cursor));
        Ok(())
    }

    fn count_frame(&mut self) -> Result<(), Option<Close>> {
        let (began, count) = &mut self.frames;
        if began.elapsed() >= Duration::from_secs(1) {
            (*began, *count) = (Instant::now(), 0);
        }
        *count += 1;
        if *count > self.follower.subscription.hub.config.max_incoming_per_second {
            return Err(Some(Close::new(close_code::POLICY, "too many frames")));
        }
        Ok(())
    }
}

/// Returns the close for a client that violates the WebSocket protocol.
fn explain(error: &axum::Error) -> Option<Close> {
    let inner = std::error::Error::source(error)?.downcast_ref::<Error>()?;
    let code = match inner {
        Error::Capacity(_) => close_code::SIZE,
        Error::Utf8(_) => close_code::INVALID,
        Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => return None,
        Error::Protocol(_) => close_code::PROTOCOL,
        _ => return None,
    };
    let mut reason = inner.to_string();
    reason.truncate(reason.floor_char_boundary(123));
    Some(Close { code, reason })
}
