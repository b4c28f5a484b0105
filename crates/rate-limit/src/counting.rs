//! A body without a known length, whose bytes are charged when it has ended.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::body::Body;
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::runtime::Handle;

use super::limiter::Limiter;

pub struct Counting {
    body: Body,
    bytes: u64,
    limiter: Arc<Limiter>,
    caller: String,
}

impl Counting {
    pub fn new(body: Body, limiter: Arc<Limiter>, caller: String) -> Self {
        Self { body, bytes: 0, limiter, caller }
    }
}

impl HttpBody for Counting {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            self.bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        let (limiter, caller, bytes) = (self.limiter.clone(), std::mem::take(&mut self.caller), self.bytes);
        if let (Ok(runtime), true) = (Handle::try_current(), bytes > 0) {
            runtime.spawn(async move { limiter.charge(&caller, bytes).await });
        }
    }
}
