//! The routes of one connection, whose requests are counted in its [`Activity`].

use std::{
    convert::Infallible,
    net::IpAddr,
    pin::Pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll, ready},
};

use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{HeaderValue, Response, StatusCode, header},
    routing::future::RouteFuture,
};
use futures_util::future::Either;
use hyper::body::{Body as _, Incoming};
use pin_project_lite::pin_project;
use tower::Service;

use super::{
    activity::{Activity, Running},
    answer,
    client_address::{ClientAddress, Proxies},
    layer::Answering,
    problem::LeavesBody,
    shortcut::{Answer, ShortCuts},
};

/// The routes of one connection.
#[derive(Clone)]
pub struct Counted {
    pub router: Router,
    pub short_cuts: Arc<ShortCuts>,
    pub peer: IpAddr,
    pub proxies: Proxies,
    pub activity: Arc<Activity>,
}

impl hyper::service::Service<Request<Incoming>> for Counted {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Counting;

    fn call(&self, request: Request<Incoming>) -> Counting {
        let running = Some(Running::start(&self.activity));
        let mut request = request.map(Body::new);
        let client = self.proxies.client(self.peer, request.headers());
        let answer = match self.short_cuts.find(&request) {
            Some(short_cut) => Either::Left(short_cut.call(request, client)),
            None => {
                request.extensions_mut().insert(ClientAddress(client));
                Either::Right(self.router.clone().call(request))
            }
        };
        Counting { answer, running }
    }
}

pin_project! {
    /// Pending answer to a counted request.
    pub struct Counting {
        #[pin]
        answer: Either<Answering<Answer>, RouteFuture<Infallible>>,
        running: Option<Running>,
    }
}

impl Future for Counting {
    type Output = Result<Response<Body>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let mut response = match ready!(this.answer.poll(cx)) {
            Ok(response) => response,
            Err(never) => match never {},
        };
        let Some(running) = this.running.take() else { return Poll::Ready(Ok(response)) };
        response = answer::guard(response, &running.0);
        running.0.cut_short.store(is_cut_short(response.status()), Relaxed);
        // `Connection: close` makes the client send its next request elsewhere. Otherwise that
        // request may arrive just when the connection is closed.
        let closes = running.0.draining.has_begun() || leaves_body(&response);
        if closes && !running.0.http2.load(Relaxed) && !is_upgrade(response.status()) {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        Poll::Ready(Ok(match response.body().size_hint().exact() {
            Some(_) => response,
            None => response.map(|body| Body::new(Streaming { body, _running: running })),
        }))
    }
}

fn is_upgrade(status: StatusCode) -> bool {
    status == StatusCode::SWITCHING_PROTOCOLS
}

/// Returns whether an answer is sent while the rest of the request is still arriving. Nothing reads
/// that rest, so the connection is closed.
fn leaves_body(response: &Response<Body>) -> bool {
    response.extensions().get::<LeavesBody>().is_some()
}

/// Returns whether an answer with this status may be sent before its request was read to the end.
fn is_cut_short(status: StatusCode) -> bool {
    matches!(status.as_u16(), 308 | 400 | 401 | 403 | 404 | 405 | 408 | 413 | 415 | 422 | 429 | 503)
}

/// Body of a streamed answer; the request counts as running until its end.
struct Streaming {
    body: Body,
    _running: Running,
}

impl hyper::body::Body for Streaming {
    type Data = bytes::Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<bytes::Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}
