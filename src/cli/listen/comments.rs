//! Prints comments from their event stream.

use std::{ops::ControlFlow, time::Duration};

use axum::{
    body::Bytes,
    http::{Method, StatusCode},
};
use clap::Args;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::{sleep, timeout};

use super::{
    super::{
        api::{self, Api, Problem},
        server::Server,
        text::note,
    },
    End, Error, From, Lines, OPEN_TIMEOUT, RECONNECT, SILENCE,
    events::Events,
};

pub const EXAMPLES: &str = "\
Each line is {\"id\":…,\"data\":{…}}. To continue later without gaps or duplicates, pass the last id with --after.

Examples:
  postrider listen comments
  postrider listen comments --from beginning --for 2s  all that are stored
  postrider listen comments --count 1";

const PATH: &str = "/api/v1/comments/stream";

#[derive(Args)]
pub struct Comments {
    /// Where to start
    #[arg(long, value_enum, default_value_t = From::End)]
    from: From,
    /// Start after this id, the id of the last comment that was printed
    #[arg(long, value_name = "ID", conflicts_with = "from")]
    after: Option<String>,
    #[command(flatten)]
    pub end: End,
    #[command(flatten)]
    server: Server,
}

impl Comments {
    pub async fn follow(&self, mut lines: Lines) -> Result<(), Error> {
        let api = self.server.client()?;
        let mut id = match self.from {
            From::Beginning => beginning(&api).await?,
            From::End => self.after.clone(),
        };
        let (mut connected, mut failures) = (false, 0);
        loop {
            match stream(&api, &mut id, &mut connected, &mut lines).await {
                Ok(ControlFlow::Break(())) => return Ok(()),
                // The server ends every stream after a while.
                Ok(ControlFlow::Continue(())) => failures = 0,
                Err(error) if !connected || error.is_final() => return Err(error),
                Err(error) => {
                    failures += 1;
                    note(&format!("{error}; connecting again"));
                }
            }
            sleep(RECONNECT.delay(failures, 0.0)).await;
        }
    }
}

/// Returns the id before the first comment: that of a new stream, with zeros for its offsets.
async fn beginning(api: &Api) -> Result<Option<String>, Error> {
    let mut body = open(api, None).await?;
    let mut events = Events::default();
    while events.id.is_none()
        && let Ok(Some(Ok(frame))) = timeout(OPEN_TIMEOUT, body.frame()).await
    {
        events.push(frame.data_ref().map_or(&[], |data| &data[..]));
        while events.next().is_some() {}
    }
    Ok(events.id.as_deref().map(zeroed))
}

/// Replaces the offsets of an id such as `1.12-7-0`, which follow its epoch.
fn zeroed(id: &str) -> String {
    let (epoch, offsets) = id.split_once('.').unwrap_or(("0", id));
    format!("{epoch}.{}", vec!["0"; offsets.split('-').count()].join("-"))
}

/// Opens the stream. The server sends the events after the id.
async fn open(api: &Api, id: Option<&str>) -> Result<Incoming, Error> {
    let headers: Vec<(&str, &str)> = id.map(|id| ("last-event-id", id)).into_iter().collect();
    let opened = timeout(OPEN_TIMEOUT, api.send(Method::GET, PATH, &headers, Bytes::new())).await;
    let (head, body) = opened.map_err(|_| api::Error::TimedOut(OPEN_TIMEOUT))??.into_parts();
    if head.status == StatusCode::OK {
        return Ok(body);
    }
    let body = timeout(OPEN_TIMEOUT, body.collect()).await;
    let body = body.ok().and_then(Result::ok).map(|body| body.to_bytes()).unwrap_or_default();
    let problem: Problem = serde_json::from_slice(&body).unwrap_or_default();
    let url = format!("{}{PATH}", api.shown());
    Err(Error::Refused { url, status: head.status.as_u16(), detail: problem.detail })
}

/// Returns the next part of the stream; `None` when it ends, or if nothing arrives for the longest
/// silence, which heartbeats break on a connection that works.
async fn next_bytes(body: &mut Incoming, silence: Duration) -> Option<Bytes> {
    let frame = timeout(silence, body.frame()).await.ok()??.ok()?;
    Some(frame.into_data().unwrap_or_default())
}

/// Prints the events of one connection until it ends.
async fn stream(
    api: &Api,
    id: &mut Option<String>,
    connected: &mut bool,
    lines: &mut Lines,
) -> Result<ControlFlow<()>, Error> {
    let resume = id.clone();
    let mut body = open(api, resume.as_deref()).await?;
    if !std::mem::replace(connected, true) {
        note(&format!("listening to comments at {}", api.shown()));
    }
    let mut events = Events::after(resume);
    while let Some(bytes) = next_bytes(&mut body, SILENCE).await {
        events.push(&bytes);
        while let Some(event) = events.next() {
            if event.kind != "message" {
                note(&format!("{}: {}", event.kind, event.data));
                continue;
            }
            let id_text = events.id.as_deref().unwrap_or_default();
            let printed = lines.print(&format!(r#"{{"id":"{id_text}","data":{}}}"#, event.data))?;
            id.clone_from(&events.id);
            if printed.is_break() {
                return Ok(printed);
            }
        }
        id.clone_from(&events.id);
    }
    Ok(ControlFlow::Continue(()))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    #[tokio::test]
    async fn a_stream_that_stays_silent_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let api = Api::new(&format!("http://{}", listener.local_addr().unwrap()), "--api").unwrap();
        let answer = async {
            let mut stream = listener.accept().await.unwrap().0;
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(stream.read_u8().await.unwrap());
            }
            let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
            stream.write_all(format!("{head}7\r\nid: 1\n\n\r\n").as_bytes()).await.unwrap();
            stream
        };
        let (body, _connection) = tokio::join!(open(&api, None), answer);
        let mut body = body.unwrap();
        let (silence, began) = (Duration::from_millis(200), Instant::now());
        assert_eq!(next_bytes(&mut body, silence).await.unwrap(), "id: 1\n\n");
        assert_eq!(next_bytes(&mut body, silence).await, None);
        assert!(began.elapsed() >= silence, "{:?}", began.elapsed());
    }

    #[test]
    fn the_beginning_has_the_epoch_and_partitions_of_the_stream() {
        assert_eq!(zeroed("0.12-7-0"), "0.0-0-0");
        assert_eq!(zeroed("3.4"), "3.0");
    }
}
