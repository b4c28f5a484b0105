//! Clients that read during the run, and the reads at the end.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use fastrand::Rng;
use reqwest::Client;
use serde_json::Value;
use tokio::time::sleep;

use super::{
    ledger::{Evidence, Topic},
    senders::{Clients, client, see},
    tail::number_of,
};
use crate::harness::{
    Answer,
    device::{Device, Surroundings},
    sessions::{Name, Notebook, Style},
    sse::Stream,
};

const COMMENTS: &str = "/api/v1/comments";
/// Receivers of messages. The last two never have a device.
pub const RECEIVERS: [&str; 6] = ["r0", "r1", "r2", "r3", "a0", "a1"];
/// The devices. Each receiver has a different set of kinds; `r1` has a single device.
pub const DEVICES: [(&str, Style); 9] = [
    ("r0", Style::Plain),
    ("r0", Style::Plain),
    ("r1", Style::Plain),
    ("r2", Style::Plain),
    ("r2", Style::Cursors),
    ("r2", Style::Events),
    ("r3", Style::Acks),
    ("r3", Style::Cursors),
    ("r3", Style::Events),
];

/// Pulls keys of the view until the stop.
pub async fn pull(clients: Clients, name: String, seed: u64) {
    let (client, mut rng) = (client(), Rng::with_seed(seed));
    while !clients.stop.is_cancelled() {
        // The keys written most recently change most often.
        let key = {
            let evidence = clients.ledger.evidence();
            let recent = evidence.writes.len().saturating_sub(200)..evidence.writes.len();
            let write = (!recent.is_empty()).then(|| &evidence.writes[rng.usize(recent)]);
            write.filter(|write| write.kind.topic() == Topic::Messages).map(|write| write.key.clone())
        };
        if let Some(key) = key {
            let request = client.get(format!("{}/pull/{key}", clients.fleet.api(&mut rng)));
            see(&clients.ledger, request, &name, &key, None).await;
        }
        sleep(Duration::from_millis(rng.u64(1..20))).await;
    }
}

/// A reader of the live stream of comments, which resumes after each interruption.
pub struct Follower {
    stream: Option<Stream>,
    after: String,
    name: String,
    rng: Rng,
    client: Client,
    /// The number of the stream's events that are in the ledger.
    written: usize,
}

impl Follower {
    /// Returns when the reader knows its first position.
    pub async fn start(clients: &Clients, name: &str, seed: u64) -> Self {
        let (name, rng) = (name.to_owned(), Rng::with_seed(seed));
        let mut follower = Self { stream: None, after: String::new(), name, rng, client: Client::new(), written: 0 };
        while follower.after.is_empty() {
            follower.step(clients).await;
        }
        follower
    }

    pub async fn run(mut self, clients: Clients) {
        loop {
            self.step(&clients).await;
        }
    }

    async fn step(&mut self, clients: &Clients) {
        let Some(stream) = &self.stream else {
            let api = clients.fleet.api(&mut self.rng);
            let opened = Stream::try_open(&self.client, &api, &format!("{COMMENTS}/stream"), &self.after).await;
            (self.stream, self.written) = (opened.ok(), 0);
            return sleep(Duration::from_millis(if self.stream.is_some() { 20 } else { 200 })).await;
        };
        let seen = stream.since(self.written);
        self.written += seen.events.len();
        let comments = seen.events.iter().filter_map(|(_, comment)| named(comment));
        clients.ledger.evidence().streamed.entry(self.name.clone()).or_default().extend(comments);
        self.after = seen.last_id;
        // Reconnecting sometimes tests that any process can resume the stream.
        if seen.ended || self.rng.u16(..) < 60 {
            self.stream = None;
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// Creates the devices of all receivers, not yet connected.
pub fn devices(clients: &Clients, notebook: &Notebook, seed: u64) -> Vec<Device> {
    let fleet = clients.fleet.clone();
    let api = Arc::new(move |rng: &mut Rng| fleet.api(rng));
    let around = Surroundings { api, notebook: notebook.clone(), calm: clients.stop.clone() };
    let device = |(number, (receiver, style)): (usize, (&str, Style))| {
        Device::new(number, receiver, style, &around, seed + number as u64)
    };
    DEVICES.into_iter().enumerate().map(device).collect()
}

/// Reads a receiver's history, page by page; `None` if a request fails.
pub async fn mailbox(client: &Client, api: &str, receiver: &str) -> Option<Vec<Name>> {
    let (mut names, mut after) = (Vec::new(), String::new());
    loop {
        let url = format!("{api}/api/v1/messages?receiverId={receiver}&limit=100&after={after}");
        let page = get(client, &url).await.filter(|page| page.status == 200)?.json();
        names.extend(page["messages"].as_array()?.iter().filter_map(|message| Name::of(&message["data"])));
        if page["gap"] == true {
            names.push(Name { receiver: "a gap".to_owned(), sender: after.clone(), number: 0 });
        }
        match page["next_cursor"].as_str() {
            Some(next) => next.clone_into(&mut after),
            None => return Some(names),
        }
    }
}

/// Returns the post and the number of a comment.
fn named(comment: &Value) -> Option<(String, u64)> {
    Some((comment["post_id"].as_str()?.to_owned(), number_of(Topic::Comments, comment)?))
}

/// Reads the list of comments, newest first; `None` if a request fails.
pub async fn listed(client: &Client, api: &str) -> Option<Vec<(String, u64)>> {
    let (mut comments, mut cursor) = (Vec::new(), String::new());
    loop {
        let page =
            get(client, &format!("{api}{COMMENTS}?limit=100{cursor}")).await.filter(|page| page.status == 200)?;
        let page = page.json();
        comments.extend(page["comments"].as_array()?.iter().filter_map(named));
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return Some(comments),
        }
    }
}

/// Returns the keys of the view that clients wrote to.
pub fn keys(evidence: &Evidence) -> BTreeSet<String> {
    let writes = evidence.writes.iter().filter(|write| write.kind.topic() == Topic::Messages);
    writes.map(|write| write.key.clone()).collect()
}

/// Pulls these keys; `None` if a request fails.
pub async fn view(client: &Client, api: &str, keys: BTreeSet<String>) -> Option<BTreeMap<String, Option<u64>>> {
    let mut view = BTreeMap::new();
    for key in keys {
        let pulled = get(client, &format!("{api}/pull/{key}")).await?;
        let number = match pulled.status {
            200 => pulled.json()["value"]["n"].as_u64(),
            404 => None,
            _ => return None,
        };
        view.insert(key, number);
    }
    Some(view)
}

pub async fn get(client: &Client, url: &str) -> Option<Answer> {
    Answer::read(client.get(url).send().await.ok()?).await.ok()
}
