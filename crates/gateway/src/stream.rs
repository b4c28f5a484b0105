//! Streams: reads newline-delimited records and writes newline-delimited results, in order and
//! concurrently.
//!
//! A window bounds the records in flight. If the client does not read its results, the window fills
//! and the body is not read further, so the sender sees back pressure.

use std::time::Instant;

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderValue, Response, header},
};
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, stream};
use http_body_util::{BodyExt, BodyStream};
use postrider_http::{
    Code, Problem, RequestContext,
    body::{self, Footprint},
};
use postrider_identity::{Denied, Principal};

use super::{
    Gateway,
    model::{ACCEPTED, RecordNumber},
};

/// A line of the body, or the error in it.
type Line = Result<Bytes, Problem>;

/// Returns the response at once; results follow as records are finished. `content_type` is the
/// request's.
pub fn respond(
    gateway: Gateway,
    topic: Option<String>,
    context: RequestContext,
    content_type: &'static str,
    request: Request,
) -> Result<Response<Body>, Problem> {
    let window = gateway.inner.config.stream_window.max(1);
    let content_type = content_type_of_answer(request.headers(), content_type);
    let lines = Lines::new(body::stream(request)?, &gateway);
    let settler = gateway.clone();
    let principal = context.principal.clone();
    let next = move |mut lines: Lines| {
        let principal = principal.clone();
        async move { lines.next(&principal).await.map(|line| (line, lines)) }
    };
    let results = stream::unfold(lines, next)
        .enumerate()
        .then(move |(number, line)| {
            let (gateway, topic, context) = (gateway.clone(), topic.clone(), context.clone());
            // One record at a time: later records do not overtake one that waits for queue space,
            // and the body is not read meanwhile.
            async move {
                let number = RecordNumber::Part(number as u64, Instant::now() + gateway.inner.http.limits().timeout);
                match line {
                    // A stream uses the line instead of a digest of the body, which is not complete
                    // yet.
                    Ok(line) => gateway.take_part(&line, &line, topic.as_deref(), &context, number).await,
                    Err(problem) => problem.into(),
                }
            }
        })
        .map(move |part| {
            let gateway = settler.clone();
            async move { Bytes::from(gateway.settle_part(part).await.to_string() + "\n") }
        })
        .buffered(window)
        .map(Ok::<_, std::convert::Infallible>);
    let mut response = Response::new(Body::from_stream(results));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    Ok(response)
}

/// Returns the name of NDJSON in the answer: the first one that `Accept` has, or that of the
/// request.
fn content_type_of_answer(headers: &HeaderMap, content_type: &'static str) -> &'static str {
    let accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let mut names = accepted.flat_map(|value| value.split(',')).filter_map(|range| range.split(';').next());
    let known = |name: &str| ACCEPTED[1..].iter().copied().find(|one| one.eq_ignore_ascii_case(name.trim()));
    names.find_map(known).unwrap_or(content_type)
}

/// Splits a body into lines of bounded length. Empty lines are skipped.
struct Lines {
    body: BodyStream<Body>,
    buffer: BytesMut,
    /// Number of bytes at the start of the buffer that contain no newline.
    searched: usize,
    footprint: Footprint,
    /// True while the rest of an overlong line is discarded.
    skipping: bool,
    ended: bool,
    limits: body::Limits,
}

impl Lines {
    fn new(body: Body, gateway: &Gateway) -> Self {
        let limits = gateway.inner.http.limits();
        Self {
            body: BodyStream::new(body),
            buffer: BytesMut::new(),
            searched: 0,
            footprint: Footprint::default(),
            skipping: false,
            ended: false,
            limits,
        }
    }

    async fn next(&mut self, principal: &Principal) -> Option<Line> {
        loop {
            if let Some(line) = self.take_line() {
                return Some(line);
            }
            if self.ended {
                return None;
            }
            let frame = tokio::select! {
                frame = tokio::time::timeout(self.limits.timeout, self.body.frame()) => frame,
                () = principal.ended() => return self.end(Denied::Expired.into()),
            };
            match frame {
                Ok(Some(Ok(frame))) => {
                    let Ok(data) = frame.into_data() else { continue };
                    if let Err(problem) = self.footprint.cover(self.buffer.len() + data.len()) {
                        return self.end(problem);
                    }
                    self.buffer.extend_from_slice(&data);
                }
                Ok(None) => self.ended = true,
                Ok(Some(Err(error))) => return self.end(body::broken(error)),
                Err(_) => {
                    let seconds = self.limits.timeout.as_secs_f32();
                    let detail = format!("no record was received within {seconds} s");
                    return self.end(Problem::new(Code::REQUEST_TIMEOUT, detail));
                }
            }
        }
    }

    /// Ends the stream with an error. The incomplete line is discarded.
    fn end(&mut self, problem: Problem) -> Option<Line> {
        self.ended = true;
        self.buffer.clear();
        self.searched = 0;
        Some(Err(problem))
    }

    /// Takes a complete line from the buffer, or the error of an overlong one.
    fn take_line(&mut self) -> Option<Line> {
        loop {
            let newline =
                self.buffer[self.searched..].iter().position(|&byte| byte == b'\n').map(|at| at + self.searched);
            let line = match newline {
                Some(at) => {
                    let mut line = self.buffer.split_to(at + 1);
                    line.truncate(at);
                    line
                }
                None if self.ended && !self.buffer.is_empty() => self.buffer.split(),
                None => {
                    self.searched = self.buffer.len();
                    return self.skip_overlong();
                }
            };
            self.searched = 0;
            if std::mem::take(&mut self.skipping) {
                continue;
            }
            if line.len() > self.limits.max_bytes {
                return Some(Err(body::too_large("record", Some(line.len() as u64), self.limits.max_bytes)));
            }
            if !line.trim_ascii().is_empty() {
                return Some(Ok(line.freeze()));
            }
        }
    }

    /// Discards the rest of an overlong line. Returns its error once.
    fn skip_overlong(&mut self) -> Option<Line> {
        if self.skipping {
            self.buffer.clear();
            self.searched = 0;
            return None;
        }
        if self.buffer.len() <= self.limits.max_bytes {
            return None;
        }
        self.skipping = true;
        self.buffer.clear();
        self.searched = 0;
        Some(Err(body::too_large("record", None, self.limits.max_bytes)))
    }
}
