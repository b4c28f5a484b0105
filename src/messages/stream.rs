//! One receiver's messages as server-sent events.

use std::{convert::Infallible, time::Duration};

use axum::{body::Body, http::Response};
use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use metrics::counter;

use super::follower::{Follower, Step};
use crate::platform::http::sse;

/// The answer that carries a follower's steps.
/// Ends after `age`, and its client resumes it.
pub fn respond(follower: Follower, age: Duration) -> Response<Body> {
    let hello = sse::hello(&follower.cursor);
    let events = stream::unfold(follower, |mut follower| async {
        let event = next(&mut follower).await?;
        Some((Ok::<_, Infallible>(event), follower))
    });
    let events = events.take_until(tokio::time::sleep(age));
    sse::respond(stream::once(async { Ok(hello) }).chain(events))
}

/// What to send next; `None` ends the stream, and its client resumes where it is.
async fn next(follower: &mut Follower) -> Option<Bytes> {
    loop {
        match follower.step().await {
            None => {
                let queue = follower.subscription.queue.clone();
                queue.woken().await;
            }
            Some(Step::End(_)) => return None,
            Some(Step::Ping) => {
                // Nothing is ever heard of the client of a stream; its connection is looked after elsewhere.
                follower.subscription.queue.heard();
                return Some(sse::HEARTBEAT);
            }
            Some(Step::Gap) => {
                let gap = format!("id: {}\nevent: gap\ndata: {{\"type\":\"gap\"}}\n\n", follower.cursor);
                return Some(gap.into());
            }
            Some(Step::Message(value)) => {
                counter!("postrider_messages_delivered_total").increment(1);
                return Some(sse::event(&follower.cursor, value.as_bytes()));
            }
        }
    }
}
