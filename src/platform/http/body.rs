//! Reading a request body within its size and its time, and no further.

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    task::Poll,
    time::Duration,
};

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Body as _;

use super::{code::Code, problem::Problem};

/// Bounds on a request body.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub max_bytes: usize,
    /// For the whole body, from its first byte asked for.
    pub timeout: Duration,
}

/// Reads the whole body. 413 when it is too large, 408 when it takes too long, 400 when it breaks.
pub async fn read(body: Body, limits: Limits) -> Result<Bytes, Problem> {
    if body.size_hint().lower() > limits.max_bytes as u64 {
        return Err(too_large(limits.max_bytes));
    }
    let mut reading = pin!(collect(body, limits.max_bytes));
    if let Some(read) = read_what_came(reading.as_mut()).await {
        return read;
    }
    tokio::time::timeout(limits.timeout, reading).await.unwrap_or_else(|_| {
        let seconds = limits.timeout.as_secs_f32();
        Err(Problem::new(Code::RequestTimeout, format!("the body was not complete within {seconds} s")))
    })
}

/// The body, when it came with its head: the connection passes it on before it waits for more, so two
/// looks are enough to tell. A timer costs more than such a body does.
async fn read_what_came<F: Future>(mut reading: Pin<&mut F>) -> Option<F::Output> {
    let mut looked = false;
    poll_fn(|cx| match reading.as_mut().poll(cx) {
        Poll::Ready(read) => Poll::Ready(Some(read)),
        Poll::Pending if looked => Poll::Ready(None),
        Poll::Pending => {
            looked = true;
            cx.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await
}

async fn collect(mut body: Body, max_bytes: usize) -> Result<Bytes, Problem> {
    let mut first: Option<Bytes> = None;
    let mut joined = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Problem::new(Code::InvalidBody, error.to_string()))?;
        let Ok(data) = frame.into_data() else { continue };
        let so_far = joined.len() + first.as_ref().map_or(0, Bytes::len);
        if so_far + data.len() > max_bytes {
            return Err(too_large(max_bytes));
        }
        match first.take() {
            None if joined.is_empty() => first = Some(data),
            None => joined.extend_from_slice(&data),
            Some(earlier) => {
                joined.extend_from_slice(&earlier);
                joined.extend_from_slice(&data);
            }
        }
    }
    Ok(first.unwrap_or_else(|| joined.freeze()))
}

/// The answer to a body over the limit.
pub fn too_large(max_bytes: usize) -> Problem {
    Problem::new(Code::BodyTooLarge, format!("the limit is {max_bytes} bytes"))
}
