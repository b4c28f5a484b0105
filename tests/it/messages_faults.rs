//! Messages while processes, Redis or Postgres are killed, restarted or lose their data.

use std::sync::Arc;

use reqwest::Client;
use serde_json::Value;
use tokio::{sync::watch, task::JoinHandle};

use crate::{
    harness::{
        App, Stack, World,
        inbox::{Times, faults, message},
        socket::Socket,
        until,
        wait::{seconds, until_now},
    },
    messages::{PATH, send, stored},
};

pub const NONE: Vec<String> = Vec::new();

/// Sends numbered messages to several receivers in turn, and retries each until it is acknowledged.
pub struct Sender {
    task: JoinHandle<Vec<Value>>,
    stop: watch::Sender<bool>,
    count: watch::Receiver<usize>,
}

impl Sender {
    /// Starts to send. `apis` may change when processes are replaced.
    pub fn start(name: &'static str, receivers: &'static [&'static str], apis: watch::Receiver<Vec<String>>) -> Self {
        let (stop, stopped) = watch::channel(false);
        let (counter, count) = watch::channel(0);
        let client = Client::builder().timeout(seconds(15)).build().unwrap();
        let task = tokio::spawn(async move {
            let mut sent = Vec::new();
            while !*stopped.borrow() {
                let number = sent.len();
                let message = message(receivers[number % receivers.len()], name, number);
                let mut attempt = number;
                until(&format!("{message} is acknowledged"), seconds(60), || {
                    attempt += 1;
                    let api = apis.borrow()[attempt % apis.borrow().len()].clone();
                    let key = format!("{name} {number}");
                    let request = client.post(format!("{api}{PATH}")).header("idempotency-key", key).json(&message);
                    async move { request.send().await.is_ok_and(|answer| answer.status() == 200).then_some(()) }
                })
                .await;
                sent.push(message);
                counter.send_replace(sent.len());
            }
            sent
        });
        Self { task, stop, count }
    }

    pub async fn more(&self, count: usize) {
        let wanted = *self.count.borrow() + count;
        let mut counted = self.count.clone();
        tokio::time::timeout(seconds(90), counted.wait_for(|&count| count >= wanted)).await.unwrap().unwrap();
    }

    pub async fn stop(self) -> Vec<Value> {
        self.stop.send_replace(true);
        self.task.await.unwrap()
    }
}

/// A client that reconnects whenever it is disconnected, until it has the last message.
pub struct Device {
    receiver: &'static str,
    cursors: bool,
    task: JoinHandle<Vec<Value>>,
}

impl Device {
    pub fn start(receiver: &'static str, cursors: bool, apis: watch::Receiver<Vec<String>>) -> Self {
        let task = tokio::spawn(async move {
            let (mut got, mut after, mut attempt) = (Vec::new(), "0".to_owned(), 0);
            loop {
                attempt += 1;
                let api = apis.borrow()[attempt % apis.borrow().len()].clone();
                let opened = match cursors {
                    true => Socket::try_cursors(&api, receiver, &after).await,
                    false => Socket::try_open(&api, &format!("?receiverId={receiver}"), &[]).await,
                };
                let Ok(socket) = opened else {
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                    continue;
                };
                let mut counted = 0;
                let last = until_now("the client is disconnected or has the last message", seconds(120), || {
                    let (count, seen) = (socket.count(), socket.seen());
                    let received = if cursors { seen.data() } else { seen.json() };
                    let last =
                        received[counted.min(received.len())..].iter().any(|message| message["content"] == "999999");
                    counted = received.len();
                    (last || (seen.ended && count == seen.frames.len())).then_some(last)
                })
                .await;
                let seen = socket.seen();
                after = seen.cursor().filter(|_| cursors).unwrap_or(after);
                got.extend(if cursors { seen.data() } else { seen.json() });
                if last {
                    return got;
                }
            }
        });
        Self { receiver, cursors, task }
    }

    /// Fails unless the client got all messages to its receiver, and nothing else.
    pub async fn check(self, sent: &[Value]) {
        let own: Vec<Value> = sent.iter().filter(|message| message["receiverId"] == self.receiver).cloned().collect();
        let got = self.task.await.unwrap();
        let times = if self.cursors { Times::Once } else { Times::OnceOrMore };
        assert_eq!(faults(self.receiver, &own, &got, times), NONE, "{} {}", self.receiver, self.cursors);
        assert!(own.len() > 10, "too few messages to prove anything");
    }
}

pub fn apis(processes: &[&App]) -> (watch::Sender<Vec<String>>, watch::Receiver<Vec<String>>) {
    watch::channel(processes.iter().map(|app| app.api.clone()).collect())
}

/// Sends each receiver its last message, at which its clients stop.
pub async fn finish(app: &App, receivers: &[&str], sent: &mut Vec<Value>) {
    for receiver in receivers {
        let last = message(receiver, "z", 999_999);
        send(app, &last).await;
        sent.push(last);
    }
}

#[tokio::test]
async fn nothing_is_lost_or_leaked_while_processes_are_killed_under_load() {
    const RECEIVERS: [&str; 4] = ["r0", "r1", "r2", "r3"];
    let world = World::new().await.with_postgres().await;
    let start = |role| world.app().role(role).start();
    let (mut one, mut two) = (start("api").await, start("api").await);
    let (mut first, mut second) = (start("processor").await, start("processor").await);
    let (to, at) = apis(&[&one, &two]);
    let senders = ["a", "b"].map(|name| Sender::start(name, &RECEIVERS, at.clone()));
    let mut devices = Vec::new();
    for receiver in RECEIVERS {
        devices.extend([true, true, false].map(|cursors| Device::start(receiver, cursors, at.clone())));
    }
    for sender in &senders {
        sender.more(60).await;
        first.kill().await;
        first = start("processor").await;
        sender.more(60).await;
        let next = start("api").await;
        to.send_replace(vec![next.api.clone(), two.api.clone()]);
        one.kill().await;
        one = next;
        sender.more(60).await;
        let next = start("api").await;
        to.send_replace(vec![one.api.clone(), next.api.clone()]);
        two.stop().await;
        two = next;
        second.stop().await;
        second = start("processor").await;
    }
    let mut sent = Vec::new();
    for sender in senders {
        sent.extend(sender.stop().await);
    }
    finish(&one, &RECEIVERS, &mut sent).await;
    for device in devices {
        device.check(&sent).await;
    }
    for receiver in RECEIVERS {
        let own: Vec<Value> = sent.iter().filter(|message| message["receiverId"] == receiver).cloned().collect();
        assert_eq!(faults(receiver, &own, &stored(&one, receiver, own.len()).await, Times::Once), NONE);
    }
    for app in [one, two, first, second] {
        app.stop().await;
    }
}

#[tokio::test]
async fn connections_wait_out_a_postgres_outage_and_no_message_is_missing_afterwards() {
    let stack = Stack::own("msgpg", &["--only", "postgres"]).await;
    let world = World::on(&stack).await.with_postgres().await;
    let app = world.app().start().await;
    let (_to, at) = apis(&[&app]);
    let sender = Sender::start("a", &["r"], at.clone());
    let devices = [Device::start("r", true, at.clone()), Device::start("r", false, at.clone())];
    sender.more(40).await;
    stack.ctl(&["restart", "postgres", "--kill"]).await;
    sender.more(40).await;
    stack.ctl(&["stop", "postgres"]).await;
    sender.more(20).await;
    app.get("/api/v1/messages?receiverId=r").await.problem(503, "postgres_unavailable");
    app.get("/api/v1/messages/stream?receiverId=r").await.problem(503, "postgres_unavailable");
    stack.ctl(&["start", "postgres"]).await;
    sender.more(20).await;
    let mut sent = sender.stop().await;
    finish(&app, &["r"], &mut sent).await;
    for device in devices {
        device.check(&sent).await;
    }
    app.stop().await;
}

#[tokio::test]
async fn a_replay_of_the_topic_changes_nothing_and_restores_what_postgres_lost() {
    let mut world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let sent: Arc<Vec<Value>> = Arc::new((0..50).map(|number| message("r", "s", number)).collect());
    for message in &*sent {
        send(&app, message).await;
    }
    assert_eq!(stored(&app, "r", 50).await, *sent);
    let socket = Socket::cursors(&app.api, "r", "").await;
    socket.frames(50).await;
    world.sql("TRUNCATE messages, message_ids, message_receivers, projection_progress").await;
    assert_eq!(stored(&app, "r", 50).await, *sent);
    send(&app, &message("r", "s", 50)).await;
    assert_eq!(socket.frames(51).await.data()[50], message("r", "s", 50), "a message was delivered twice");
    app.stop().await;
    world.set("POSTRIDER_KAFKA__GROUP_PREFIX", &format!("{}again_", world.prefix));
    world.sql("UPDATE projection_progress SET next = 0").await;
    let app = world.app().start().await;
    until("all records were read again", seconds(30), || async {
        (app.metric("postrider_messages_duplicate_records_total").await >= Some(51.0)).then_some(())
    })
    .await;
    stored(&app, "r", 51).await;
    app.stop().await;
}
