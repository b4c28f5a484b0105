//! Sends traces over HTTP with the client that calls other people's endpoints too, so that there is one HTTP client.

use std::{fmt, pin::Pin, time::Duration};

use axum::http::{Request, Response};
use bytes::Bytes;
use opentelemetry_http::{HttpClient, HttpError};
use tokio::runtime::Handle;

use crate::platform::outbound::{Client, Endpoint, Guard, Options, OptionsError};

/// Exports on a runtime, whatever thread asks for it.
#[derive(Clone)]
pub struct Exporter {
    client: Client,
    runtime: Handle,
}

impl Exporter {
    /// Call it inside the runtime.
    pub fn new(timeout: Duration) -> Result<Self, OptionsError> {
        let (guard, max_retry_after) = (Guard::open(), Duration::ZERO);
        let client = Client::new(&Options { guard, timeout, max_idle: 1, max_retry_after, ca_file: None })?;
        Ok(Self { client, runtime: Handle::current() })
    }
}

impl fmt::Debug for Exporter {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Exporter").finish_non_exhaustive()
    }
}

impl HttpClient for Exporter {
    fn send_bytes<'client, 'sending>(
        &'client self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'sending>>
    where
        'client: 'sending,
        Self: 'sending,
    {
        let client = self.client.clone();
        // The library's own thread has no runtime.
        let sent = self.runtime.spawn(async move {
            let (head, body) = request.into_parts();
            let endpoint = Endpoint::new(&head.uri.to_string(), head.headers)?;
            let status = client.post(&endpoint, endpoint.headers(0), body).await.map_err(|failure| failure.message)?;
            Ok(Response::builder().status(status).body(Bytes::new())?)
        });
        Box::pin(async move { sent.await? })
    }
}
