//! Sends one POST and returns its outcome.

use std::{
    error::Error as StdError,
    path::PathBuf,
    sync::LazyLock,
    time::{Duration, SystemTime},
};

use axum::http::{HeaderMap, Method, Request, Response, StatusCode, header};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Incoming};
use hyper_util::{
    client::legacy::{self, Client as Pool},
    rt::{TokioExecutor, TokioTimer},
};
use postrider_config::SecretUrl;
use tokio::time::{Instant, timeout_at};

use super::{
    connect::{ConnectError, Connector},
    endpoint::Endpoint,
    guard::Guard,
    retry_after,
};

/// Longest answer that is read, in bytes; beyond it the connection is dropped.
const MAX_ANSWER_BYTES: usize = 64 << 10;
/// Longest head of an answer, in bytes.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// Time limit for the body of an answer whose status, which decides, is known. Reading the body
/// only makes the connection reusable, or tells more about a failure.
const BODY_GRACE: Duration = Duration::from_millis(500);
/// Time for which an idle connection is kept.
const IDLE: Duration = Duration::from_secs(30);
/// Part of a failed answer's body that is kept for operators, in bytes.
const EXCERPT_BYTES: usize = 300;

/// Settings of the client.
#[derive(Debug, Clone)]
pub struct Options {
    pub guard: Guard,
    /// Time limit of one attempt: name, connection, TLS, request, and answer together.
    pub timeout: Duration,
    /// Maximum number of idle connections kept per host.
    pub max_idle: usize,
    /// Longest `Retry-After` that is honoured.
    pub max_retry_after: Duration,
    /// PEM file of certificate authorities that are trusted in addition to the system's.
    pub ca_file: Option<PathBuf>,
}

/// A failed attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// A stable word: `timeout`, `connect`, `dns`, `tls`, `refused_address`, `redirect`, `gone`,
    /// `connection`, `bad_answer`, or `http_` and the status.
    pub class: &'static str,
    /// Text for operators: what happened, with the beginning of the answer if there was one.
    pub message: String,
    /// Wait that the endpoint asked for.
    pub retry_after: Option<Duration>,
    /// Set if the endpoint answered that it is permanently gone (410).
    pub gone: bool,
}

/// Errors of the client's settings.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    #[error("{path}: {source}")]
    Unreadable { path: String, source: std::io::Error },
    #[error("TLS: {0}")]
    Tls(#[from] native_tls::Error),
}

/// HTTP client that keeps connections and reuses them. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    connector: Connector,
    pool: Pool<Connector, Full<Bytes>>,
    timeout: Duration,
    max_retry_after: Duration,
}

impl Client {
    pub fn new(options: &Options) -> Result<Self, OptionsError> {
        let connector = Connector::new(options.guard.clone(), options.ca_file.as_deref(), options.timeout)?;
        // A request is sent again on another connection only if none of it was sent on the first.
        let pool = Pool::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(options.max_idle)
            .http1_max_buf_size(MAX_HEAD_BYTES)
            .retry_canceled_requests(true)
            .build(connector.clone());
        Ok(Self { connector, pool, timeout: options.timeout, max_retry_after: options.max_retry_after })
    }

    /// Returns the error of an endpoint that [`Self::post`] refuses or cannot resolve, without a
    /// connection.
    pub async fn check(&self, endpoint: &Endpoint) -> Result<(), ConnectError> {
        self.connector.check(&endpoint.uri).await
    }

    /// Sends `body` with `headers`, which extend those of [`Endpoint::headers`]. Any 2xx is
    /// success.
    pub async fn post(&self, endpoint: &Endpoint, headers: HeaderMap, body: Bytes) -> Result<StatusCode, Failure> {
        let deadline = Instant::now() + self.timeout;
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = endpoint.uri.clone();
        *request.headers_mut() = headers;
        let answer = self.answer(request, deadline).await?;
        let body_deadline = deadline.min(Instant::now() + BODY_GRACE);
        if answer.status().is_success() {
            let status = answer.status();
            read(answer.into_body(), 0, body_deadline).await;
            return Ok(status);
        }
        Err(self.refused(answer, body_deadline).await)
    }

    /// Fetches a document of at most this many bytes.
    pub async fn get(&self, endpoint: &Endpoint, max_bytes: usize) -> Result<Vec<u8>, Failure> {
        let deadline = Instant::now() + self.timeout;
        let mut request = Request::new(Full::new(Bytes::new()));
        *request.uri_mut() = endpoint.uri.clone();
        *request.headers_mut() = endpoint.headers(0);
        let answer = self.answer(request, deadline).await?;
        if !answer.status().is_success() {
            return Err(self.refused(answer, deadline.min(Instant::now() + BODY_GRACE)).await);
        }
        let body = Limited::new(answer.into_body(), max_bytes).collect();
        match timeout_at(deadline, body).await {
            Ok(Ok(body)) => Ok(body.to_bytes().into()),
            Ok(Err(error)) => Err(Failure::new("bad_answer", error.to_string())),
            Err(_) => Err(self.timed_out()),
        }
    }

    async fn answer(&self, request: Request<Full<Bytes>>, deadline: Instant) -> Result<Response<Incoming>, Failure> {
        match timeout_at(deadline, self.pool.request(request)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(classify(&error)),
            Err(_) => Err(self.timed_out()),
        }
    }

    fn timed_out(&self) -> Failure {
        Failure::new("timeout", format!("no answer within {} s", self.timeout.as_secs_f32()))
    }

    async fn refused(&self, answer: Response<Incoming>, deadline: Instant) -> Failure {
        let (head, body) = answer.into_parts();
        let (status, headers) = (head.status, head.headers);
        let excerpt = excerpt(&read(body, EXCERPT_BYTES, deadline).await);
        let retry_after = headers.get(header::RETRY_AFTER).map(header::HeaderValue::as_bytes);
        let retry_after = retry_after.and_then(|at| retry_after::parse(at, SystemTime::now(), self.max_retry_after));
        let (class, message) = if status.is_redirection() {
            let to = headers.get(header::LOCATION).map(|to| SecretUrl::new(self::excerpt(to.as_bytes())).to_string());
            let to = to.unwrap_or_default();
            ("redirect", format!("answered {} to `{to}`; redirects are not followed", status.as_u16()))
        } else {
            let class = if status == StatusCode::GONE { "gone" } else { http_class(status) };
            (class, format!("answered {}{}{excerpt}", status.as_u16(), if excerpt.is_empty() { "" } else { ": " }))
        };
        Failure { class, message, retry_after, gone: status == StatusCode::GONE }
    }
}

impl Failure {
    fn new(class: &'static str, message: impl Into<String>) -> Self {
        Self { class, message: message.into(), retry_after: None, gone: false }
    }
}

/// Reads a body to its end, up to the size limit and the deadline, and returns its first bytes. If
/// the end is not reached, the connection cannot be reused; nothing else is lost.
async fn read(mut body: Incoming, keep: usize, deadline: Instant) -> Vec<u8> {
    let mut kept = Vec::new();
    let mut left = MAX_ANSWER_BYTES;
    if body.size_hint().lower() > MAX_ANSWER_BYTES as u64 {
        left = keep;
    }
    while left > 0 && !body.is_end_stream() {
        let Ok(Some(Ok(frame))) = timeout_at(deadline, body.frame()).await else { break };
        let Ok(data) = frame.into_data() else { continue };
        left = left.saturating_sub(data.len());
        let room = keep.saturating_sub(kept.len()).min(data.len());
        kept.extend_from_slice(&data[..room]);
    }
    kept
}

/// Turns text from an endpoint into one line without control characters.
fn excerpt(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let words: Vec<&str> = text.split(|letter: char| letter.is_whitespace() || letter.is_control()).collect();
    words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Returns `http_500` and so on, as static strings.
fn http_class(status: StatusCode) -> &'static str {
    static NAMES: LazyLock<Vec<String>> = LazyLock::new(|| (100..1_000).map(|code| format!("http_{code}")).collect());
    NAMES.get(usize::from(status.as_u16()).wrapping_sub(100)).map_or("http", String::as_str)
}

fn classify(error: &legacy::Error) -> Failure {
    if let Some(refused) = find::<ConnectError>(error) {
        return Failure::new(refused.class(), refused.to_string());
    }
    match find::<hyper::Error>(error) {
        Some(error) if error.is_parse() => Failure::new("bad_answer", format!("not an HTTP answer: {error}")),
        Some(error) if error.is_incomplete_message() => {
            Failure::new("connection", "the connection was closed before an answer arrived")
        }
        Some(error) => Failure::new("connection", innermost(error)),
        None => Failure::new("connection", innermost(error)),
    }
}

fn chain<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

fn find<'a, E: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a E> {
    chain(error).find_map(|error| error.downcast_ref())
}

/// Returns the text of the innermost error, which says what happened; the outer ones say which
/// layer noticed.
fn innermost(error: &(dyn StdError + 'static)) -> String {
    chain(error).last().map(ToString::to_string).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_a_word() {
        for code in [100, 404, 500, 599, 999] {
            assert_eq!(http_class(StatusCode::from_u16(code).unwrap()), format!("http_{code}"));
        }
    }

    #[test]
    fn text_from_an_endpoint_becomes_one_line() {
        assert_eq!(excerpt(b" {\n\t\"error\": \"\x1b[31m\x00 no\" }\r\n"), r#"{ "error": " [31m no" }"#);
        assert_eq!(excerpt(&[0xff, b'a']), "\u{fffd}a");
    }
}
