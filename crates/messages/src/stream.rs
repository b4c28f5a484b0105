//! Delivers one receiver's messages as server-sent events.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{body::Body, http::Response};
use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use metrics::counter;
use postrider_http::sse;
use postrider_identity::Principal;

use super::follower::{Follower, Step};

/// Returns the response that streams a follower's steps. It ends after `age`, and the client
/// resumes.
pub fn respond(follower: Follower, age: Duration, principal: Arc<Principal>) -> Response<Body> {
    let hello = sse::hello(&follower.cursor);
    let events = stream::unfold(follower, |mut follower| async {
        let event = next(&mut follower).await?;
        Some((Ok::<_, Infallible>(event), follower))
    });
    let events = events.take_until(tokio::time::sleep(age));
    sse::respond(stream::once(async { Ok(hello) }).chain(events), principal)
}

/// Returns the next event. `None` ends the stream, and the client resumes from its last id.
async fn next(follower: &mut Follower) -> Option<Bytes> {
    loop {
        match follower.step().await {
            None => {
                let queue = follower.subscription.queue.clone();
                queue.woken().await;
            }
            Some(Step::End(_)) => return None,
            Some(Step::Ping) => {
                // The client of an event stream never sends anything; the HTTP server detects a
                // dead connection.
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
