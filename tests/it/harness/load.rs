//! Load: writers that count up, each on its own key, until the test stops them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use reqwest::{Client, Method};
use serde_json::json;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{App, check::Write, wait::until_now};

const PATIENCE: Duration = Duration::from_secs(60);

/// The results of all writes.
#[derive(Default, Debug)]
pub struct Outcome {
    pub acknowledged: Vec<Write>,
    pub refused: Vec<Refusal>,
    /// Number of connections that broke or could not be opened.
    pub broken: usize,
}

/// A write that was answered with a problem.
#[derive(Debug)]
pub struct Refusal {
    pub write: Write,
    pub status: u16,
    pub code: String,
}

impl Outcome {
    /// Returns the writes that were refused with this code.
    pub fn refused_as(&self, code: &str) -> Vec<Write> {
        self.refused.iter().filter(|refusal| refusal.code == code).map(|refusal| refusal.write.clone()).collect()
    }

    /// Fails if there was any other answer than an acknowledgement or a problem with one of these
    /// codes.
    pub fn expect_only(&self, codes: &[&str]) {
        let expected = |refusal: &&Refusal| refusal.status == 503 && codes.contains(&refusal.code.as_str());
        let others: Vec<&Refusal> = self.refused.iter().filter(|refusal| !expected(refusal)).collect();
        assert!(others.is_empty() && self.broken == 0, "{} broke, {others:?}", self.broken);
        assert!(!self.acknowledged.is_empty());
    }
}

/// Running writers.
pub struct Load {
    stop: CancellationToken,
    progress: Vec<Arc<Progress>>,
    writers: Vec<JoinHandle<Outcome>>,
}

/// Counts of the answers to one writer.
#[derive(Default)]
struct Progress {
    acknowledged: AtomicUsize,
    refused: AtomicUsize,
}

/// The endpoint that the writers use.
#[derive(Clone)]
pub enum Target {
    /// `POST /push`
    Push,
    /// `POST /produce` to this topic
    Produce(String),
}

impl Load {
    /// Starts writers `w0`, `w1`… against the process. Writers do not retry: each number is sent
    /// once, so that the order in the log can be checked.
    pub fn start(app: &App, target: &Target, writers: usize) -> Self {
        let stop = CancellationToken::new();
        let progress: Vec<Arc<Progress>> = (0..writers).map(|_| Arc::default()).collect();
        let writer = |(number, progress): (usize, &Arc<Progress>)| {
            let (client, url, target) = (app.client.clone(), app.api.clone(), target.clone());
            let (stop, progress) = (stop.clone(), progress.clone());
            tokio::spawn(async move { write(&client, &url, &target, &format!("w{number}"), &stop, &progress).await })
        };
        Self { writers: progress.iter().enumerate().map(writer).collect(), stop, progress }
    }

    /// Waits until this many more writes are acknowledged.
    pub async fn more(&self, count: usize) {
        let acknowledged = || self.acknowledged().iter().sum::<usize>();
        let goal = acknowledged() + count;
        let what = format!("{count} more writes are acknowledged");
        until_now(&what, PATIENCE, || (acknowledged() >= goal).then_some(())).await;
    }

    /// Waits until each writer has this many more acknowledgements.
    pub async fn each_more(&self, count: usize) {
        let goals: Vec<usize> = self.acknowledged().iter().map(|done| done + count).collect();
        let what = format!("each writer has {count} more acknowledgements");
        until_now(&what, PATIENCE, || {
            self.acknowledged().iter().zip(&goals).all(|(done, goal)| done >= goal).then_some(())
        })
        .await;
    }

    /// Waits until each writer was refused, which shows that none is blocked by a server that is
    /// down.
    pub async fn each_refused(&self) {
        let refused = |progress: &Arc<Progress>| progress.refused.load(Ordering::Relaxed) > 0;
        until_now("each writer was refused", PATIENCE, || self.progress.iter().all(refused).then_some(())).await;
    }

    fn acknowledged(&self) -> Vec<usize> {
        self.progress.iter().map(|progress| progress.acknowledged.load(Ordering::Relaxed)).collect()
    }

    /// Stops the writers after their pending requests.
    pub async fn stop(self) -> Outcome {
        self.stop.cancel();
        let mut all = Outcome::default();
        for writer in self.writers {
            let outcome = writer.await.unwrap();
            all.acknowledged.extend(outcome.acknowledged);
            all.refused.extend(outcome.refused);
            all.broken += outcome.broken;
        }
        all
    }
}

async fn write(
    client: &Client,
    url: &str,
    target: &Target,
    key: &str,
    stop: &CancellationToken,
    progress: &Progress,
) -> Outcome {
    let mut outcome = Outcome::default();
    for number in 1_u64.. {
        if stop.is_cancelled() {
            break;
        }
        let (path, body) = match target {
            Target::Push => ("/push", json!({"key": key, "value": number})),
            Target::Produce(topic) => ("/produce", json!({"topic": topic, "key": key, "payload": number})),
        };
        let answer = client.request(Method::POST, format!("{url}{path}")).json(&body).send().await;
        let answer = match answer {
            Ok(answer) => super::Answer::read(answer).await,
            Err(error) => Err(error),
        };
        match answer {
            Ok(answer) if answer.status < 300 => {
                outcome.acknowledged.push((key.to_owned(), number));
                progress.acknowledged.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            Ok(answer) => {
                let code = answer.json()["code"].as_str().unwrap_or("?").to_owned();
                outcome.refused.push(Refusal { write: (key.to_owned(), number), status: answer.status, code });
                progress.refused.fetch_add(1, Ordering::Relaxed);
            }
            Err(_) => outcome.broken += 1,
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    outcome
}

/// A reader that pulls the writers' keys in a loop.
pub struct Readers {
    stop: CancellationToken,
    /// Number of reads so far that were answered with 200 or 404.
    sights: Arc<AtomicUsize>,
    reader: JoinHandle<super::check::Watch>,
}

impl Readers {
    /// Pulls `w0`… in turn. Only answers with 200 and 404 count; others are skipped.
    pub fn start(app: &App, keys: usize) -> Self {
        let stop = CancellationToken::new();
        let (client, url, ended) = (app.client.clone(), app.api.clone(), stop.clone());
        let sights = Arc::<AtomicUsize>::default();
        let counted = sights.clone();
        let reader = tokio::spawn(async move {
            let mut watch = super::check::Watch::default();
            for number in (0..keys).cycle() {
                if ended.is_cancelled() {
                    break;
                }
                let key = format!("w{number}");
                let Some(answer) = pull(&client, &url, &key).await else { continue };
                match answer.status {
                    200 => watch.see((key, answer.json()["value"].as_u64())),
                    404 => watch.see((key, None)),
                    _ => tokio::time::sleep(Duration::from_millis(5)).await,
                }
                counted.store(watch.sights, Ordering::Relaxed);
            }
            watch
        });
        Self { stop, sights, reader }
    }

    /// Waits until this many reads were answered with 200 or 404.
    pub async fn sights(&self, count: usize) {
        let what = format!("{count} reads said anything");
        until_now(&what, PATIENCE, || (self.sights.load(Ordering::Relaxed) >= count).then_some(())).await;
    }

    pub async fn stop(self) -> super::check::Watch {
        self.stop.cancel();
        self.reader.await.unwrap()
    }
}

async fn pull(client: &Client, url: &str, key: &str) -> Option<super::Answer> {
    let answer = client.get(format!("{url}/pull/{key}")).send().await.ok()?;
    super::Answer::read(answer).await.ok()
}

/// Returns the writers' keys in the view, once it is complete.
pub async fn view(app: &App, keys: usize) -> std::collections::BTreeMap<String, Option<u64>> {
    let mut view = std::collections::BTreeMap::new();
    for number in 0..keys {
        let key = format!("w{number}");
        let answer = super::until(&format!("the view answers for {key}"), Duration::from_secs(30), || async {
            Some(app.get(&format!("/pull/w{number}")).await).filter(|answer| matches!(answer.status, 200 | 404))
        })
        .await;
        view.insert(key, answer.json()["value"].as_u64());
    }
    view
}
