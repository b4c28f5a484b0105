//! Sends traces over HTTP with the client that also calls external endpoints, so that there is one
//! HTTP client.

use std::{fmt, pin::Pin, time::Duration};

use axum::http::{Request, Response};
use bytes::Bytes;
use opentelemetry_http::{HttpClient, HttpError};
use postrider_outbound::{Client, Endpoint, Guard, Options, OptionsError};
use tokio::runtime::Handle;

/// HTTP client of the trace exporter. Requests run on one runtime, whatever thread starts them.
#[derive(Clone)]
pub struct Exporter {
    client: Client,
    runtime: Handle,
}

impl Exporter {
    /// Creates an exporter that runs on the current runtime. Call it inside the runtime.
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
        // The library calls this from its own thread, which has no runtime.
        let sent = self.runtime.spawn(async move {
            let (head, body) = request.into_parts();
            let endpoint = Endpoint::new(&head.uri.to_string(), head.headers)?;
            let status = client.post(&endpoint, endpoint.headers(0), body).await.map_err(|failure| failure.message)?;
            Ok(Response::builder().status(status).body(Bytes::new())?)
        });
        Box::pin(async move { sent.await? })
    }
}
