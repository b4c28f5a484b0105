//! Round trip of each capability: what is written and what must be readable afterwards.

use std::{future::Future, time::Duration};

use axum::{
    body::Bytes,
    http::{Method, StatusCode},
};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::{super::api, LOOK_EVERY, visitor::Visitor};

/// The reason why the round trip of a capability failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Api(#[from] api::Error),
    #[error("timed out after {} s", .0.as_secs())]
    TimedOut(Duration),
    #[error("pull returned another value")]
    OtherValue,
    #[error("produce answered without partition and offset: {0}")]
    NoPosition(Value),
    #[error("the stream answered {}", .0.as_u16())]
    StreamRefused(StatusCode),
    #[error("the stream broke: {0}")]
    StreamBroke(#[source] hyper::Error),
    #[error("the stream ended without the message: {seen}")]
    StreamEnded { seen: String },
    #[error("a post without an id: {0}")]
    NoPostId(Value),
    #[error("the feed shows {what}: {shown:?} instead of {wanted:?}")]
    WrongFeed { what: &'static str, shown: Vec<u64>, wanted: Vec<u64> },
}

impl Visitor {
    pub(super) async fn kv(&self) -> Result<(), Error> {
        let (key, value) = (format!("roundtrip-{}", self.mark), json!({"mark": self.mark}));
        let pushed = self.post("/push", &json!({"key": key, "value": value, "ttl_seconds": 3600})).await?;
        let position = pushed.expect(StatusCode::ACCEPTED, "push")?.header("postrider-position").to_owned();
        let path = format!("/pull/{key}");
        until(|| async {
            // A pull fails while a partition's view is rebuilt or has just moved; try again.
            let answer = self.call(Method::GET, &path, &[("postrider-after", &position)], Bytes::new()).await?;
            match answer.status {
                StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => Ok(false),
                _ if answer.json()["value"] == value => Ok(true),
                _ => {
                    answer.expect(StatusCode::OK, "pull")?;
                    Err(Error::OtherValue)
                }
            }
        })
        .await?;
        self.call(Method::DELETE, &path, &[], Bytes::new()).await?.expect(StatusCode::ACCEPTED, "delete")?;
        Ok(())
    }

    pub(super) async fn gateway(&self, topic: &str) -> Result<(), Error> {
        let record = json!({"topic": topic, "key": self.mark, "payload": {"mark": self.mark}});
        let answer = self.post("/produce", &record).await?.expect(StatusCode::OK, "produce")?.json();
        let has_position = answer["success"] == true && answer["partition"].is_i64() && answer["offset"].is_i64();
        if has_position { Ok(()) } else { Err(Error::NoPosition(answer)) }
    }

    pub(super) async fn comments(&self) -> Result<(), Error> {
        let comment = json!({"text": format!("roundtrip {}", self.mark), "post_id": self.mark});
        self.post("/api/v1/comments", &comment).await?.expect(StatusCode::OK, "posting")?;
        let path = format!("/api/v1/comments?post_id={}", self.mark);
        until(|| async {
            let answer = self.get(&path).await?.expect(StatusCode::OK, "the list")?.json();
            Ok(answer["comments"][0]["text"] == comment["text"])
        })
        .await
    }

    pub(super) async fn messages(&self) -> Result<(), Error> {
        let path = format!("/api/v1/messages/stream?receiverId={}", self.mark);
        let mut stream = self.stream(&path).await?;
        let content = format!("roundtrip {}", self.mark);
        let message =
            json!({"chatId": "roundtrip", "senderId": "roundtrip", "receiverId": self.mark, "content": content});
        self.post("/api/v1/message/action", &message).await?.expect(StatusCode::OK, "sending")?;
        let mut seen = String::new();
        while let Some(frame) = stream.frame().await {
            let frame = frame.map_err(Error::StreamBroke)?;
            seen.push_str(&String::from_utf8_lossy(frame.data_ref().map_or(&[][..], |data| data)));
            if seen.contains(&content) {
                return Ok(());
            }
        }
        Err(Error::StreamEnded { seen })
    }

    /// Returns false if presence is disabled.
    pub(super) async fn presence(&self) -> Result<bool, Error> {
        if self.get(&format!("/api/v1/presence/{}", self.mark)).await?.status == StatusCode::NOT_FOUND {
            return Ok(false);
        }
        let stream = self.stream(&format!("/api/v1/messages/stream?receiverId={}", self.mark)).await?;
        until(|| self.is_present("connected", 1)).await?;
        drop(stream);
        // Takes a while: a receiver that reconnects within `messages.presence.linger_ms` stays
        // connected.
        until(|| self.is_present("disconnected", 0)).await.map(|()| true)
    }

    async fn is_present(&self, state: &str, connections: u64) -> Result<bool, Error> {
        let answer = self.get(&format!("/api/v1/presence/{}", self.mark)).await?;
        if answer.status == StatusCode::SERVICE_UNAVAILABLE {
            return Ok(false);
        }
        let presence = answer.expect(StatusCode::OK, "presence")?.json();
        Ok(presence["state"] == state && presence["connections"] == connections)
    }

    pub(super) async fn feed(&self) -> Result<(), Error> {
        let (author, reader) = (format!("author-{}", self.mark), format!("reader-{}", self.mark));
        let follow = json!({"follower_id": reader, "followee_id": author});
        self.post("/follow", &follow).await?.expect(StatusCode::OK, "following")?;
        let (first, second) = (self.publish(&author).await?, self.publish(&author).await?);
        until(|| async { Ok(self.feed_of(&reader).await?.is_some_and(|posts| posts == [second, first])) }).await?;
        // Deletions take effect with their response, so no waiting from here on.
        self.delete_post(first).await?;
        self.get(&format!("/posts/{first}")).await?.expect(StatusCode::NOT_FOUND, "reading a deleted post")?;
        self.shows(&reader, &[second], "a deleted post").await?;
        self.post("/unfollow", &follow).await?.expect(StatusCode::OK, "unfollowing")?;
        self.shows(&reader, &[], "the post of an unfollowed author").await?;
        self.delete_post(second).await
    }

    async fn publish(&self, author: &str) -> Result<u64, Error> {
        let post = json!({"author_id": author, "content": format!("roundtrip {}", self.mark)});
        let answer = self.post("/posts", &post).await?.expect(StatusCode::ACCEPTED, "posting")?.json();
        answer["post_id"].as_u64().ok_or(Error::NoPostId(answer))
    }

    async fn delete_post(&self, id: u64) -> Result<(), Error> {
        let path = format!("/posts/{id}");
        self.call(Method::DELETE, &path, &[], Bytes::new()).await?.expect(StatusCode::OK, "deleting a post")?;
        Ok(())
    }

    /// Returns post ids, newest first, or nothing while neither Redis nor Postgres can be read.
    async fn feed_of(&self, reader: &str) -> Result<Option<Vec<u64>>, Error> {
        let answer = self.get(&format!("/feeds/{reader}")).await?;
        if answer.status == StatusCode::SERVICE_UNAVAILABLE {
            return Ok(None);
        }
        let page = answer.expect(StatusCode::OK, "the feed")?.json();
        Ok(page["post_ids"].as_array().map(|ids| ids.iter().filter_map(Value::as_u64).collect()))
    }

    async fn shows(&self, reader: &str, wanted: &[u64], what: &'static str) -> Result<(), Error> {
        until(|| async {
            match self.feed_of(reader).await? {
                Some(posts) if posts == wanted => Ok(true),
                Some(shown) => Err(Error::WrongFeed { what, shown, wanted: wanted.to_vec() }),
                None => Ok(false),
            }
        })
        .await
    }

    async fn stream(&self, path: &str) -> Result<Incoming, Error> {
        let answer = self.send(Method::GET, path, &[], Bytes::new()).await?;
        if answer.status() == StatusCode::OK {
            Ok(answer.into_body())
        } else {
            Err(Error::StreamRefused(answer.status()))
        }
    }

    pub(super) async fn dead_letters(&self) -> Result<bool, Error> {
        let answer = self.get("/admin/dlq?limit=1&since=1m").await?;
        match answer.status {
            // The dead-letter API is disabled, or busy with another query: it responds, nothing to
            // check.
            StatusCode::NOT_FOUND | StatusCode::TOO_MANY_REQUESTS => Ok(false),
            _ => {
                answer.expect(StatusCode::OK, "the list of dead letters")?;
                Ok(true)
            }
        }
    }
}

/// Repeats the check until it returns true. The capability's timeout bounds it.
async fn until<F: Future<Output = Result<bool, Error>>>(mut check: impl FnMut() -> F) -> Result<(), Error> {
    while !check().await? {
        sleep(LOOK_EVERY).await;
    }
    Ok(())
}
