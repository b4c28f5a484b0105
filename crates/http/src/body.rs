//! Reads a request body within limits of size, time and available memory.

use std::{
    future::poll_fn,
    ops::Deref,
    pin::{Pin, pin},
    task::Poll,
    time::Duration,
};

use axum::{body::Body, extract::Request};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Body as _;
use postrider_limits::memory::{Lease, budgets};

use super::{code::Code, encoding, problem::Problem};

/// First bytes of each body, which draw from the budget for small bodies. The rest of a large body,
/// however slow, does not use up that budget.
const SMALL: usize = 16 << 10;
/// Largest body that is not counted if it arrived with its head, in bytes: it is in its
/// connection's own buffer.
const UNCOUNTED: usize = 8 << 10;

/// Bounds on a request body.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub max_bytes: usize,
    /// Time limit of the whole body, from the first read on.
    pub timeout: Duration,
}

/// Leases that a body holds on the memory budgets.
#[derive(Default)]
pub struct Footprint {
    small: Option<Lease>,
    large: Option<Lease>,
}

impl Footprint {
    /// Extends the leases to this many bytes, if they cover less. 503 when a budget is used up.
    pub fn cover(&mut self, bytes: usize) -> Result<(), Problem> {
        let small = bytes.min(SMALL);
        let parts = [
            (&mut self.small, &budgets().small_requests, small),
            (&mut self.large, &budgets().requests, bytes - small),
        ];
        for (lease, budget, needed) in parts {
            let covered = match lease {
                Some(lease) => lease.bytes() >= needed || lease.grow(needed - lease.bytes()),
                None if needed == 0 => true,
                None => {
                    *lease = budget.lease(needed);
                    lease.is_some()
                }
            };
            if !covered {
                return Err(Problem::new(
                    Code::OVERLOADED,
                    "the memory budget for request bodies is used up; retry later",
                ));
            }
        }
        Ok(())
    }
}

/// A complete body, with its leases on the budgets.
pub struct RequestBody {
    bytes: Bytes,
    _footprint: Footprint,
}

impl Deref for RequestBody {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Returns the body of a request, to be read as a stream: decompressed if it has a
/// `Content-Encoding`, of which those that are not supported are 415.
pub fn stream(request: Request) -> Result<Body, Problem> {
    encoding::plain(request, None)
}

/// Returns the error of a body that could not be read.
pub fn broken(error: axum::Error) -> Problem {
    encoding::broken(error)
}

/// Reads the whole body, decompressed. Errors: 413 when it is too large, 408 when it takes too
/// long, 400 when the connection breaks or the body is not what its `Content-Encoding` says, 415
/// when that is not supported, 503 when there is no memory for it.
pub async fn read(request: Request, limits: Limits) -> Result<RequestBody, Problem> {
    let body = encoding::plain(request, Some(limits.max_bytes))?;
    let declared = body.size_hint().lower();
    if declared > limits.max_bytes as u64 {
        return Err(too_large("body", Some(declared), limits.max_bytes));
    }
    let mut reading = pin!(collect(body, limits.max_bytes));
    if let Some(read) = read_buffered(reading.as_mut()).await {
        return read;
    }
    tokio::time::timeout(limits.timeout, reading).await.unwrap_or_else(|_| {
        let seconds = limits.timeout.as_secs_f32();
        Err(Problem::new(Code::REQUEST_TIMEOUT, format!("the body was not complete within {seconds} s")))
    })
}

/// Returns the body if it arrived with its head. The connection passes it on before it waits for
/// more, so two polls are enough to decide. A timer costs more than such a body.
async fn read_buffered<F: Future>(mut reading: Pin<&mut F>) -> Option<F::Output> {
    let mut polled = false;
    poll_fn(|cx| match reading.as_mut().poll(cx) {
        Poll::Ready(read) => Poll::Ready(Some(read)),
        Poll::Pending if polled => Poll::Ready(None),
        Poll::Pending => {
            polled = true;
            cx.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await
}

async fn collect(mut body: Body, max_bytes: usize) -> Result<RequestBody, Problem> {
    let mut footprint = Footprint::default();
    let mut first: Option<Bytes> = None;
    let mut joined = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(broken)?;
        let Ok(data) = frame.into_data() else { continue };
        let so_far = joined.len() + first.as_ref().map_or(0, Bytes::len);
        if so_far + data.len() > max_bytes {
            return Err(too_large("body", None, max_bytes));
        }
        match first.take() {
            None if joined.is_empty() => {
                if data.len() > UNCOUNTED {
                    footprint.cover(data.len())?;
                }
                first = Some(data);
            }
            earlier => {
                let earlier = earlier.unwrap_or_default();
                let needed = joined.len() + earlier.len() + data.len();
                if needed > joined.capacity() {
                    // Double the capacity, so that bytes are copied once or twice and not once per
                    // frame.
                    let capacity = (2 * joined.capacity()).max(needed).min(max_bytes);
                    footprint.cover(joined.capacity() + capacity)?;
                    joined.reserve(capacity - joined.len());
                }
                joined.extend_from_slice(&earlier);
                joined.extend_from_slice(&data);
            }
        }
    }
    let bytes = first.unwrap_or_else(|| joined.freeze());
    Ok(RequestBody { bytes, _footprint: footprint })
}

/// Returns the error for a body, or a record of a stream, over the limit. `bytes` is its size, if it
/// is known.
pub fn too_large(what: &str, bytes: Option<u64>, max_bytes: usize) -> Problem {
    let detail = match bytes {
        Some(bytes) => format!("the {what} has {bytes} bytes; at most {max_bytes} are accepted"),
        None => format!("the {what} has more than {max_bytes} bytes, which is the limit"),
    };
    Problem::new(Code::BODY_TOO_LARGE, detail)
}
