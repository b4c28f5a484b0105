//! HTTP client for a running installation.

use std::{error::Error as _, time::Duration};

use axum::{
    body::Bytes,
    http::{Method, Request, Response, StatusCode},
};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{self, Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use postrider_config::masked;
use serde_json::Value;
use uuid::Uuid;

/// The reason why a request did not get the expected response.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{url}: {source}")]
    Invalid { url: String, source: axum::http::Error },
    #[error("{url}: {source}{}", cause(.source))]
    Send { url: String, source: legacy::Error },
    #[error("{path}: {source}")]
    Body { path: String, source: hyper::Error },
    #[error("no answer within {} s", .0.as_secs())]
    TimedOut(Duration),
    #[error("{what} answered {}: {body}", .status.as_u16())]
    Answered { what: &'static str, status: StatusCode, body: String },
}

/// Returns the cause of an error of the client, whose own text lacks it.
fn cause(error: &legacy::Error) -> String {
    error.source().map_or_else(String::new, |cause| format!(": {cause}"))
}

/// Client of one installation. Cheap to clone.
#[derive(Clone)]
pub struct Api {
    client: Client<HttpConnector, Full<Bytes>>,
    url: String,
    /// Part of every name that the run writes, so that it never matches another client's data.
    pub mark: String,
}

pub struct Answer {
    pub status: StatusCode,
    /// Value of the header `Postrider-Position`.
    pub position: String,
    body: Bytes,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    pub fn expect(self, status: StatusCode, what: &'static str) -> Result<Self, Error> {
        if self.status == status {
            return Ok(self);
        }
        let body: String = String::from_utf8_lossy(&self.body).chars().take(500).collect();
        Err(Error::Answered { what, status: self.status, body })
    }
}

impl Api {
    pub fn new(url: &str) -> Self {
        Self {
            client: Client::builder(TokioExecutor::new()).build_http(),
            url: url.trim_end_matches('/').to_owned(),
            mark: Uuid::now_v7().simple().to_string(),
        }
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
        let answer = self.send(method, path, headers, body).await?;
        let status = answer.status();
        let position = answer.headers().get("postrider-position").and_then(|value| value.to_str().ok());
        let position = position.unwrap_or_default().to_owned();
        let body = answer.into_body().collect().await;
        let body = body.map_err(|source| Error::Body { path: path.to_owned(), source })?.to_bytes();
        Ok(Answer { status, position, body })
    }

    /// Returns as soon as the head of the response has arrived; the body may be an endless stream.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Result<Response<Incoming>, Error> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body));
        let request = request.map_err(|source| Error::Invalid { url: masked(&self.url), source })?;
        let failed = |source| Error::Send { url: format!("{}{path}", masked(&self.url)), source };
        self.client.request(request).await.map_err(failed)
    }
}
