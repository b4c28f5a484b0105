//! Prints new posts of a feed, which is read again and again: feeds have no stream.

use std::{collections::HashSet, ops::ControlFlow};

use axum::http::StatusCode;
use clap::Args;
use serde_json::Value;
use tokio::time::{sleep, timeout};

use super::{
    super::{
        api::{self, Api},
        duration::Span,
        server::Server,
        text::note,
    },
    End, Error, From, Lines, OPEN_TIMEOUT, RECONNECT,
};

pub const EXAMPLES: &str = "\
Feeds have no stream: this reads the feed again and again (GET /feeds/USER), page by page down to the posts that it has seen, and prints the new ones, oldest first. Posts that appear below those, as those of a newly followed author do, are not printed.

Examples:
  postrider listen feed bea
  postrider listen feed bea --from beginning --count 5
  postrider listen feed bea --interval 5s";

#[derive(Args)]
pub struct Feed {
    /// Id of the user
    #[arg(value_name = "USER")]
    user: String,
    /// Where to start
    #[arg(long, value_enum, default_value_t = From::End)]
    from: From,
    /// Wait between two reads
    #[arg(long, value_name = "DURATION", default_value = "1s")]
    interval: Span,
    #[command(flatten)]
    pub end: End,
    #[command(flatten)]
    server: Server,
}

impl Feed {
    pub async fn follow(&self, mut lines: Lines) -> Result<(), Error> {
        let api = self.server.client()?;
        let (mut seen, mut failures) = (None::<HashSet<i64>>, 0);
        loop {
            match self.unseen(&api, seen.as_ref()).await {
                Ok(posts) => {
                    failures = 0;
                    let is_first = seen.is_none();
                    if is_first {
                        note(&format!("listening to the feed of {} at {}", self.user, api.shown()));
                    }
                    let shown = !is_first || self.from == From::Beginning;
                    let known = seen.get_or_insert_default();
                    for post in posts.iter().rev() {
                        if shown && lines.print_json(post)? == ControlFlow::Break(()) {
                            return Ok(());
                        }
                        known.extend(post["id"].as_i64());
                    }
                }
                Err(error) if seen.is_none() || error.is_final() => return Err(error),
                Err(error) => {
                    failures += 1;
                    note(&format!("{error}; reading again"));
                }
            }
            sleep(self.interval.0.max(RECONNECT.delay(failures, 0.0))).await;
        }
    }

    /// Returns the posts above the first known one, newest first. Without known ones, returns all.
    async fn unseen(&self, api: &Api, seen: Option<&HashSet<i64>>) -> Result<Vec<Value>, Error> {
        let mut posts = Vec::new();
        let mut cursor = String::new();
        loop {
            let mut query = url::form_urlencoded::Serializer::new(String::new());
            query.append_pair("limit", "100").append_pair("expand", "posts");
            if !cursor.is_empty() {
                query.append_pair("cursor", &cursor);
            }
            let user: String = url::form_urlencoded::byte_serialize(self.user.as_bytes()).collect();
            let path = format!("/feeds/{}?{}", user.replace('+', "%20"), query.finish());
            let answer = timeout(OPEN_TIMEOUT, api.get(&path)).await;
            let answer = answer.unwrap_or(Err(api::Error::TimedOut(OPEN_TIMEOUT)))?;
            if answer.status != StatusCode::OK {
                let url = format!("{}/feeds/{}", api.shown(), self.user);
                return Err(Error::Refused { url, status: answer.status.as_u16(), detail: answer.problem().detail });
            }
            let page = answer.json();
            for post in page["posts"].as_array().into_iter().flatten() {
                let is_known = post["id"].as_i64().is_none_or(|id| seen.is_some_and(|seen| seen.contains(&id)));
                if is_known {
                    return Ok(posts);
                }
                posts.push(post.clone());
            }
            match page["next_cursor"].as_str() {
                // The feed was empty at first, or all of a page is new: continues below it.
                Some(next) => next.clone_into(&mut cursor),
                None => return Ok(posts),
            }
        }
    }
}
