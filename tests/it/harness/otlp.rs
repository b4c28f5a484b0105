//! An OTLP collector that keeps the requests it receives over gRPC and HTTP.

use std::sync::{Arc, Mutex};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, HeaderValue, Response},
    routing::post,
};
use futures_util::stream;
use http_body_util::StreamBody;
use hyper::body::Frame;
use tokio::{net::TcpListener, task::JoinHandle};

type Received = Arc<Mutex<Vec<(&'static str, Bytes)>>>;

/// A running collector, which stops on drop.
pub struct Collector {
    pub url: String,
    received: Received,
    server: JoinHandle<()>,
}

impl Collector {
    pub async fn start() -> Self {
        let received = Received::default();
        let router = Router::new()
            .route("/v1/traces", post(over_http))
            .route("/opentelemetry.proto.collector.trace.v1.TraceService/Export", post(over_grpc))
            .with_state(received.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { url, received, server }
    }

    /// Returns the protocol by which a span of this trace came, `http` or `grpc`. Finds the trace
    /// id by its raw bytes.
    pub fn protocol_of(&self, trace_id: u128) -> Option<&'static str> {
        let id = trace_id.to_be_bytes();
        let received = self.received.lock().unwrap();
        let with = received.iter().find(|(_, bytes)| bytes.windows(16).any(|window| window == id));
        with.map(|(protocol, _)| *protocol)
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn over_http(State(received): State<Received>, headers: HeaderMap, body: Bytes) -> Response<Body> {
    assert_eq!(headers["content-type"], "application/x-protobuf");
    received.lock().unwrap().push(("http", body));
    let mut response = Response::new(Body::empty());
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/x-protobuf"));
    response
}

/// Answers with an empty, uncompressed message, and status 0 in the trailers.
async fn over_grpc(State(received): State<Received>, body: Bytes) -> Response<Body> {
    received.lock().unwrap().push(("grpc", body));
    let trailers = HeaderMap::from_iter([("grpc-status".parse().unwrap(), HeaderValue::from_static("0"))]);
    let frames = [Frame::data(Bytes::from_static(&[0; 5])), Frame::trailers(trailers)];
    let frames = stream::iter(frames.map(Ok::<_, std::convert::Infallible>));
    let mut response = Response::new(Body::new(StreamBody::new(frames)));
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    response
}
