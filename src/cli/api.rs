//! HTTP client for a running installation: its API and its management port.

use std::{error::Error as StdError, time::Duration};

use axum::{
    body::Bytes,
    http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header},
};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{self, Client},
    rt::TokioExecutor,
};
use postrider_config::masked;
use postrider_outbound::{Connector, Guard, OptionsError};
use serde::Deserialize;
use serde_json::Value;

/// URL of an API on this machine.
pub const LOCAL: &str = "http://127.0.0.1:8080";
/// Variable with an API key or a token.
const KEY_VARIABLE: &str = "API_KEY";
/// Time within which a connection must be open.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Part of an unexpected answer that an error shows, in characters.
const SHOWN_CHARS: usize = 500;

/// The reason why a request did not get the expected response.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{option}` must be a URL such as {example}")]
    Url { option: &'static str, example: &'static str },
    #[error("the variable `{KEY_VARIABLE}` has characters that a header cannot have")]
    Key,
    #[error("{url}: {source}")]
    Invalid { url: String, source: axum::http::Error },
    #[error("{url}: {}", innermost(.source))]
    Send { url: String, source: legacy::Error },
    #[error("{path}: {source}")]
    Body { path: String, source: hyper::Error },
    #[error("no answer within {} s", .0.as_secs())]
    TimedOut(Duration),
    #[error("{what} answered {}: {body}", .status.as_u16())]
    Answered { what: &'static str, status: StatusCode, body: String },
    #[error("TLS: {0}")]
    Tls(#[from] OptionsError),
}

/// Returns the text of the innermost error, which says what happened.
pub fn innermost(error: &(dyn StdError + 'static)) -> String {
    let chain = std::iter::successors(Some(error), |&error| error.source());
    chain.last().map(ToString::to_string).unwrap_or_default()
}

/// An error response of the API, as far as commands read it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Problem {
    pub code: String,
    pub detail: String,
}

/// Returns whether paths can be appended to this URL of an HTTP server.
fn is_base(url: &str) -> bool {
    let parsed = url::Url::parse(url);
    url.split_once("://").is_some_and(|(_, rest)| !rest.starts_with('/'))
        && parsed.is_ok_and(|url| {
            matches!(url.scheme(), "http" | "https")
                && url.has_host()
                && url.query().is_none()
                && url.fragment().is_none()
        })
}

/// Client of one server. Cheap to clone.
#[derive(Clone)]
pub struct Api {
    client: Client<Connector, Full<Bytes>>,
    connector: Connector,
    url: String,
    authorization: Option<HeaderValue>,
}

pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    body: Bytes,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// Returns the error that the body describes. A body of another kind is the detail.
    pub fn problem(&self) -> Problem {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| Problem { code: String::new(), detail: self.text() })
    }

    /// Returns the beginning of the body.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).chars().take(SHOWN_CHARS).collect()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// Returns the wait that the server asks for.
    pub fn retry_after(&self) -> Option<Duration> {
        self.header(header::RETRY_AFTER.as_str()).parse().ok().map(Duration::from_secs)
    }

    pub fn expect(self, status: StatusCode, what: &'static str) -> Result<Self, Error> {
        if self.status == status {
            return Ok(self);
        }
        Err(Error::Answered { what, status: self.status, body: self.text() })
    }
}

impl Api {
    /// Creates a client of the API at this URL, which this option gave. It sends the credential in
    /// the variable `API_KEY`, if there is one.
    pub fn new(url: &str, option: &'static str) -> Result<Self, Error> {
        let mut api = Self::at(url, option, LOCAL)?;
        if let Some(key) = std::env::var(KEY_VARIABLE).ok().filter(|key| !key.is_empty()) {
            let mut value = HeaderValue::try_from(format!("Bearer {key}")).map_err(|_| Error::Key)?;
            value.set_sensitive(true);
            api.authorization = Some(value);
        }
        Ok(api)
    }

    /// Creates a client of a management port at this URL, which `--management` gave.
    pub fn of_management(url: &str) -> Result<Self, Error> {
        Self::at(url, "--management", "http://127.0.0.1:9090")
    }

    fn at(url: &str, option: &'static str, example: &'static str) -> Result<Self, Error> {
        if !is_base(url) {
            return Err(Error::Url { option, example });
        }
        let connector = Connector::new(Guard::open(), None, CONNECT_TIMEOUT)?;
        let client = Client::builder(TokioExecutor::new()).build(connector.clone());
        Ok(Self { client, connector, url: url.trim_end_matches('/').to_owned(), authorization: None })
    }

    /// Returns the URL without credentials.
    pub fn shown(&self) -> String {
        masked(&self.url)
    }

    /// Returns the full URL of a path.
    pub fn url_of(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }

    /// Returns the connector, for connections that are not plain HTTP requests.
    pub fn connector(&self) -> &Connector {
        &self.connector
    }

    /// Returns the header `Authorization` that every request has.
    pub fn authorization(&self) -> Option<&HeaderValue> {
        self.authorization.as_ref()
    }

    pub async fn get(&self, path: &str) -> Result<Answer, Error> {
        self.call(Method::GET, path, &[], Bytes::new()).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Result<Answer, Error> {
        self.call(Method::POST, path, &[("content-type", "application/json")], body.to_string().into()).await
    }

    pub async fn call(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Result<Answer, Error> {
        let (head, body) = self.send(method, path, headers, body).await?.into_parts();
        let body = body.collect().await;
        let body = body.map_err(|source| Error::Body { path: path.to_owned(), source })?.to_bytes();
        Ok(Answer { status: head.status, headers: head.headers, body })
    }

    /// Returns as soon as the head of the response has arrived; the body may be an endless stream.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Result<Response<Incoming>, Error> {
        let mut request = Request::builder().method(method).uri(self.url_of(path));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(value) = &self.authorization {
            request = request.header(header::AUTHORIZATION, value);
        }
        let request = request.body(Full::new(body));
        let request = request.map_err(|source| Error::Invalid { url: self.shown(), source })?;
        let failed = |source| Error::Send { url: format!("{}{path}", self.shown()), source };
        self.client.request(request).await.map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_url_of_an_http_server_is_taken() {
        for url in ["http://127.0.0.1:8080", "https://u:p@example.com/prefix/", "http://[::1]:9090"] {
            assert!(Api::new(url, "--api").is_ok(), "{url}");
        }
        for url in
            ["", "127.0.0.1:8080", "localhost:8080", "ftp://h", "http://", "http:///x", "http://h/?a=b", "http://a b"]
        {
            let error = Api::new(url, "--api").err().map(|error| error.to_string());
            assert_eq!(error.as_deref(), Some("`--api` must be a URL such as http://127.0.0.1:8080"), "{url}");
        }
    }
}
