//! Prints the messages to a receiver from a WebSocket with the subprotocol `postrider.v1`.

use std::{ops::ControlFlow, time::Duration};

use axum::http::{HeaderValue, StatusCode, Uri, header};
use clap::Args;
use futures_util::{SinkExt, StreamExt};
use postrider_outbound::Stream;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{self, Message, client::IntoClientRequest},
};

use super::{
    super::{
        api::{Api, Problem, innermost},
        server::Server,
        text::note,
    },
    End, Error, Lines, OPEN_TIMEOUT, RECONNECT, SILENCE,
};

pub const EXAMPLES: &str = "\
Starts with the messages that the receiver does not have yet. Each line is {\"id\":…,\"type\":\"message\",\"data\":{…}}. A message is acknowledged once its line is written, so that it is not delivered again on the next connection; --no-ack leaves it undelivered.

Examples:
  postrider listen receiver bob
  postrider listen receiver bob --no-ack --for 2s      only look
  postrider listen receiver bob --count 1 | jq .data.content";

const PATH: &str = "/api/v1/websocket/message";

#[derive(Args)]
pub struct Receiver {
    /// Id of the receiver
    #[arg(value_name = "ID")]
    receiver: String,
    /// Start after this id instead of after the last message that was received
    #[arg(long, value_name = "ID")]
    after: Option<String>,
    /// Do not acknowledge messages
    #[arg(long)]
    no_ack: bool,
    #[command(flatten)]
    pub end: End,
    #[command(flatten)]
    server: Server,
}

/// Reason why a connection ended.
enum Ended {
    /// Enough was printed.
    Enough,
    /// The server or the network ended it. The server may ask for a wait.
    Disconnected(Option<Duration>),
}

impl Receiver {
    pub async fn follow(&self, mut lines: Lines) -> Result<(), Error> {
        let api = self.server.client()?;
        let mut after = self.after.clone();
        let (mut connected, mut failures) = (false, 0);
        loop {
            let wait = match self.connect(&api, after.as_deref()).await {
                Ok(socket) => {
                    if !std::mem::replace(&mut connected, true) {
                        note(&format!("listening to messages to {} at {}", self.receiver, api.shown()));
                    }
                    failures = 0;
                    match self.receive(&api, socket, &mut after, &mut lines).await? {
                        Ended::Enough => return Ok(()),
                        Ended::Disconnected(wait) => wait,
                    }
                }
                Err(error) if !connected || error.is_final() => return Err(error),
                Err(error) => {
                    note(&format!("{error}; connecting again"));
                    None
                }
            };
            failures += 1;
            sleep(wait.unwrap_or_else(|| RECONNECT.delay(failures, 0.0))).await;
        }
    }

    async fn connect(&self, api: &Api, after: Option<&str>) -> Result<WebSocketStream<Stream>, Error> {
        let failed = |detail: String| Error::Connect { url: format!("{}{PATH}", api.shown()), detail };
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        query.append_pair("receiverId", &self.receiver);
        if let Some(after) = after {
            query.append_pair("after", after);
        }
        let url = api.url_of(&format!("{PATH}?{}", query.finish()));
        let uri: Uri = url.parse().map_err(|error| failed(format!("{error}")))?;
        let mut request =
            url.replacen("http", "ws", 1).into_client_request().map_err(|error| failed(error.to_string()))?;
        request.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static("postrider.v1"));
        if let Some(value) = api.authorization() {
            request.headers_mut().insert(header::AUTHORIZATION, value.clone());
        }
        let open = async {
            let stream = api.connector().connect(&uri).await.map_err(|error| failed(innermost(&error)))?;
            match client_async(request, stream).await {
                Ok((socket, _)) => Ok(socket),
                Err(tungstenite::Error::Http(answer)) => {
                    let body = answer.body().as_deref().unwrap_or_default();
                    let problem: Problem = serde_json::from_slice(body).unwrap_or_default();
                    let url = format!("{}{PATH}", api.shown());
                    Err(Error::Refused { url, status: answer.status().as_u16(), detail: problem.detail })
                }
                Err(error) => Err(failed(error.to_string())),
            }
        };
        let late = |_| failed(format!("no connection within {} s", OPEN_TIMEOUT.as_secs()));
        timeout(OPEN_TIMEOUT, open).await.map_err(late)?
    }

    /// Prints and acknowledges messages until the connection ends. `after` follows the messages
    /// that were printed.
    async fn receive(
        &self,
        api: &Api,
        mut socket: WebSocketStream<Stream>,
        after: &mut Option<String>,
        lines: &mut Lines,
    ) -> Result<Ended, Error> {
        while let Some(Ok(frame)) = next_frame(&mut socket, SILENCE).await {
            let text = match frame {
                Message::Text(text) => text,
                Message::Close(frame) => {
                    return Ok(Ended::Disconnected(frame.and_then(|frame| wait_of(&frame.reason))));
                }
                // The library answers pings.
                _ => continue,
            };
            let frame: Value = serde_json::from_str(&text).unwrap_or_default();
            if frame["type"] == "gap" {
                note("some messages before the next one have been deleted");
                continue;
            }
            let printed = lines.print(&text)?;
            let id = frame["id"].as_str().map(str::to_owned);
            if let Some(id) = id.as_ref().filter(|_| !self.no_ack)
                && socket.send(Message::text(json!({"ack": id}).to_string())).await.is_err()
            {
                *after = Some(id.clone());
                return Ok(Ended::Disconnected(None));
            }
            *after = id.or(after.take());
            if printed == ControlFlow::Break(()) {
                let _ = timeout(Duration::from_secs(2), socket.close(None)).await;
                if let Some(id) = after.as_ref().filter(|_| !self.no_ack) {
                    self.confirm(api, id).await;
                }
                return Ok(Ended::Enough);
            }
        }
        Ok(Ended::Disconnected(None))
    }

    /// Acknowledges what was printed, and waits until that is stored: what arrives by WebSocket is
    /// stored a little later, and the next connection might get the messages again.
    async fn confirm(&self, api: &Api, id: &str) {
        let body = json!({"receiverId": self.receiver, "ack": id});
        let answer = timeout(OPEN_TIMEOUT, api.post("/api/v1/messages/ack", &body)).await;
        if !matches!(answer, Ok(Ok(answer)) if answer.status == StatusCode::OK) {
            note("the server did not confirm the acknowledgement; the last messages may be delivered again");
        }
    }
}

/// Waits for a frame. A server that sends none for half of the longest silence is asked for one;
/// `None` if it does not answer either, as when a router has lost the connection.
async fn next_frame(
    socket: &mut WebSocketStream<Stream>,
    silence: Duration,
) -> Option<Result<Message, tungstenite::Error>> {
    if let Ok(frame) = timeout(silence / 2, socket.next()).await {
        return frame;
    }
    let answer = async {
        socket.send(Message::Ping(Vec::new().into())).await.ok()?;
        socket.next().await
    };
    timeout(silence / 2, answer).await.ok().flatten()
}

/// Returns the wait of a close reason such as `retry_after_ms=250`.
fn wait_of(reason: &str) -> Option<Duration> {
    reason.strip_prefix("retry_after_ms=")?.parse().ok().map(Duration::from_millis)
}

impl Error {
    /// Returns whether a repeated request would be refused as well.
    pub(super) fn is_final(&self) -> bool {
        match self {
            Self::Refused { status, .. } => !matches!(status, 429 | 500..),
            Self::Print(_) => true,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use clap::Parser;
    use tokio::net::{TcpListener, TcpStream};
    use tokio_tungstenite::{accept_hdr_async, tungstenite::handshake::server};

    use super::*;

    #[derive(Parser)]
    struct Words {
        #[command(flatten)]
        receiver: Receiver,
    }

    /// Connects a receiver. Returns both ends of its connection.
    async fn connected() -> (WebSocketStream<Stream>, WebSocketStream<TcpStream>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let Words { receiver } = Words::parse_from(["listen", "bob", "--api", &url]);
        let accept = async {
            let stream = listener.accept().await.unwrap().0;
            #[expect(clippy::result_large_err, reason = "the type is the library's")]
            let agree = |_: &server::Request, mut answer: server::Response| {
                answer.headers_mut().insert("sec-websocket-protocol", HeaderValue::from_static("postrider.v1"));
                Ok(answer)
            };
            accept_hdr_async(stream, agree).await.unwrap()
        };
        let api = receiver.server.client().unwrap();
        let (client, server) = tokio::join!(receiver.connect(&api, None), accept);
        (client.unwrap(), server)
    }

    #[tokio::test]
    async fn a_server_that_stays_silent_is_given_up_after_it_was_asked() {
        // The server reads nothing, and so does not answer the ping.
        let (mut client, mut server) = connected().await;
        let (silence, began) = (Duration::from_millis(200), Instant::now());
        assert!(next_frame(&mut client, silence).await.is_none());
        assert!(began.elapsed() >= silence, "{:?}", began.elapsed());
        assert!(matches!(server.next().await, Some(Ok(Message::Ping(_)))));
    }

    #[tokio::test]
    async fn a_server_that_answers_a_ping_is_not_given_up() {
        let (mut client, mut server) = connected().await;
        let answering = tokio::spawn(async move { server.next().await.is_some() && server.flush().await.is_ok() });
        let frame = next_frame(&mut client, Duration::from_secs(2)).await;
        assert!(matches!(frame, Some(Ok(Message::Pong(_)))), "{frame:?}");
        assert!(answering.await.unwrap());
    }

    #[test]
    fn the_server_may_ask_for_a_wait() {
        assert_eq!(wait_of("retry_after_ms=250"), Some(Duration::from_millis(250)));
        assert_eq!(wait_of("client too slow; resume after the last id"), None);
    }
}
