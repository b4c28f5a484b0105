//! Clients that post, delete posts, and make readers follow and unfollow authors; and readers of
//! feeds.
//!
//! One client sends all writes about an author, one after the other, so their order is known. After
//! a write with an unknown outcome, its pair of reader and author, or its post, gets no more
//! writes, because it may take effect late.

use std::time::Duration;

use fastrand::Rng;
use reqwest::{Client, RequestBuilder};
use serde_json::{Value, json};
use tokio::time::sleep;

use super::{
    events::{Page, Shown, number},
    ledger::{Kind, Outcome},
    readers::get,
    senders::{Clients, LastAttempts, answer, broken, client, code, refusal},
};

/// The users whose feeds are read.
pub const READERS: [&str; 5] = ["u0", "u1", "u2", "u3", "u4"];
/// The number of authors of a client at a time.
const AUTHORS: usize = 3;
/// The number of posts that a client remembers, to delete some of them.
const REMEMBERED: usize = 30;

/// A client that writes.
pub struct Poster {
    clients: Clients,
    name: String,
    /// True if writes have idempotency keys and are retried; otherwise each write is sent once.
    repeats: bool,
    client: Client,
    rng: Rng,
    number: u64,
    /// The number of the oldest author that it still writes about.
    oldest: usize,
    /// Posts that exist, with their authors and numbers.
    posts: Vec<(i64, String, u64)>,
    last_attempts: LastAttempts,
}

impl Poster {
    pub fn new(clients: Clients, repeats: bool, name: &str, seed: u64) -> Self {
        let (name, rng, posts) = (name.to_owned(), Rng::with_seed(seed), Vec::new());
        let last_attempts = LastAttempts::default();
        Self { clients, name, repeats, client: client(), rng, number: 0, oldest: 0, posts, last_attempts }
    }

    /// Writes until the stop, and finishes the current write.
    pub async fn run(mut self) {
        while !self.clients.stop.is_cancelled() {
            self.number += 1;
            match self.rng.u8(0..100) {
                0..55 => self.post().await,
                55..70 => self.delete().await,
                70..88 => self.turn(Kind::Follow).await,
                _ => self.turn(Kind::Unfollow).await,
            }
            let pause = Duration::from_millis(self.rng.u64(10..100));
            let _ = self.clients.stop.run_until_cancelled(sleep(pause)).await;
        }
    }

    fn author(&mut self) -> String {
        format!("{}-{}", self.name, self.oldest + self.rng.usize(..AUTHORS))
    }

    async fn post(&mut self) {
        let (author, number) = (self.author(), self.number);
        let content = format!("{number} {}", "x".repeat(self.rng.usize(0..200)));
        let body = json!({"author_id": author, "content": content});
        let write = self.clients.ledger.begin(Kind::Post, &author, number);
        let (_, answered) = self.write(write, |client, api| client.post(format!("{api}/posts")).json(&body)).await;
        let Some(id) = answered.and_then(|answer| answer["post_id"].as_i64()) else { return };
        self.clients.ledger.evidence().writes[write].post = Some(id);
        self.posts.push((id, author, number));
        if self.posts.len() > REMEMBERED {
            self.posts.remove(0);
        }
    }

    async fn delete(&mut self) {
        if self.posts.is_empty() {
            return;
        }
        let (id, author, number) = self.posts.swap_remove(self.rng.usize(..self.posts.len()));
        let write = self.clients.ledger.begin(Kind::DeletePost, &author, number);
        self.clients.ledger.evidence().writes[write].post = Some(id);
        self.write(write, |client, api| client.delete(format!("{api}/posts/{id}"))).await;
    }

    async fn turn(&mut self, kind: Kind) {
        let (author, reader) = (self.author(), self.rng.choice(READERS).unwrap());
        let path = if kind == Kind::Follow { "follow" } else { "unfollow" };
        let body = json!({"follower_id": reader, "followee_id": author});
        let write = self.clients.ledger.begin(kind, &format!("{reader} {author}"), self.number);
        let (outcome, _) = self.write(write, |client, api| client.post(format!("{api}/{path}")).json(&body)).await;
        if outcome == Outcome::Unknown {
            // This replaces all current authors, also those of pairs with known outcomes. New pairs follow soon.
            self.oldest += AUTHORS;
        }
    }

    /// Sends one write until it is acknowledged or abandoned; returns its outcome and the response.
    async fn write(
        &mut self,
        write: usize,
        request: impl Fn(&Client, &str) -> RequestBuilder,
    ) -> (Outcome, Option<Value>) {
        let mut known = Outcome::Refused;
        loop {
            let api = self.clients.fleet.api(&mut self.rng);
            let mut request = request(&self.client, &api).timeout(Duration::from_millis(self.rng.u64(1_500..8_000)));
            if self.repeats {
                request = request.header("idempotency-key", format!("{} {write}", self.name));
            }
            self.clients.ledger.attempt(write);
            let (outcome, body) = match answer(request).await {
                Ok(answer) if answer.status < 300 => {
                    (Outcome::Acknowledged(None), serde_json::from_slice(&answer.body).ok())
                }
                Ok(answer) => (refusal(&self.clients.ledger, &self.name, answer.status, &code(&answer)), None),
                Err(error) => (broken(&error), None),
            };
            self.clients.ledger.settle(write, outcome);
            if outcome != Outcome::Refused {
                known = outcome;
            }
            if matches!(outcome, Outcome::Acknowledged(_)) || !self.repeats {
                return (known, body);
            }
            if self.last_attempts.are_over(&self.clients.stop) {
                return (known, None);
            }
            sleep(Duration::from_millis(self.rng.u64(50..300))).await;
        }
    }
}

/// Reads feeds, page after page, until the stop.
pub async fn read(clients: Clients, seed: u64) {
    let (client, mut rng) = (client(), Rng::with_seed(seed));
    let mut next: Option<(String, String)> = None;
    while !clients.stop.is_cancelled() {
        let (reader, cursor) = match next.take() {
            Some((reader, cursor)) if rng.u8(..) < 180 => (reader, format!("&cursor={cursor}")),
            _ => (rng.choice(READERS).unwrap().to_owned(), String::new()),
        };
        let limit = rng.choice([5, 20, 100]).unwrap();
        let url = format!("{}/feeds/{reader}?limit={limit}{cursor}", clients.fleet.api(&mut rng));
        let asked_ms = clients.ledger.now_ms();
        match get(&client, &url).await {
            Some(page) if page.status == 200 => {
                let body = page.json();
                let posts = body["post_ids"].as_array().into_iter().flatten().filter_map(Value::as_i64).collect();
                let at_ms = clients.ledger.now_ms();
                next = body["next_cursor"].as_str().map(|cursor| (reader.clone(), cursor.to_owned()));
                clients.ledger.evidence().pages.push(Page { reader, asked_ms, at_ms, posts });
            }
            Some(page) if page.status == 503 => {
                *clients.ledger.evidence().answers.entry(format!("503 {}", code(&page))).or_default() += 1;
            }
            Some(page) => clients.ledger.incident(format!("{url} got {}: {}", page.status, page.text())),
            None => {}
        }
        sleep(Duration::from_millis(rng.u64(20..150))).await;
    }
}

/// Reads a reader's whole feed; `None` if a request fails.
pub async fn feed(client: &Client, api: &str, reader: &str) -> Option<Vec<Shown>> {
    let (mut shown, mut cursor) = (Vec::new(), String::new());
    loop {
        let url = format!("{api}/feeds/{reader}?limit=100&expand=posts{cursor}");
        let page = get(client, &url).await.filter(|page| page.status == 200)?.json();
        for post in page["posts"].as_array()? {
            let author = post["author_id"].as_str()?.to_owned();
            shown.push(Shown { post: post["id"].as_i64()?, author, number: number(&post["content"])? });
        }
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return Some(shown),
        }
    }
}
