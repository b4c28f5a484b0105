//! A proxy in front of a broker that answers heartbeats of a group's member itself, as if all was well: the broker throws
//! the member out, and the member never hears of it. It can also lose the first answer to a member that asks for commits.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use tokio::{
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinHandle,
};

use super::{
    metadata_proxy::{read_frame, unsigned, write_frame},
    proxy::accept,
};

/// Kafka's numbers of the heartbeats of classic and of KIP-848 groups.
const OFFSET_FETCH: i16 = 9;
const HEARTBEAT: i16 = 12;
const CONSUMER_GROUP_HEARTBEAT: i16 = 68;

/// Ends when it is dropped.
pub struct HeartbeatProxy {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    upstream: Mutex<String>,
    /// The client whose heartbeats count.
    client: String,
    /// Connections that were ever made, and how many of them are lied to.
    connections: AtomicUsize,
    lied_to: AtomicUsize,
    /// Heartbeats of the client that went through.
    carried: AtomicUsize,
    /// Heartbeats that were answered here since the last one that went through.
    answered: AtomicUsize,
    /// The next answer to a question for commits is to be lost.
    loses_commits: AtomicBool,
}

impl HeartbeatProxy {
    /// For the client with this id.
    pub async fn start(client: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared { client: client.to_owned(), ..Shared::default() });
        let server = tokio::spawn(accept(listener, {
            let shared = shared.clone();
            move |client| carry(client, shared.clone())
        }));
        Self { address, shared, server }
    }

    /// Where connections go from now on, as `host:port`.
    pub fn lead_to(&self, upstream: &str) {
        upstream.clone_into(&mut self.shared.upstream.lock().unwrap());
    }

    /// From now on answers heartbeats on the connections that are open, and carries those of later ones.
    pub fn lie(&self) {
        self.shared.lied_to.store(self.shared.connections.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Loses the next answer that says what the group has committed.
    pub fn lose_commits(&self) {
        self.shared.loses_commits.store(true, Ordering::Relaxed);
    }

    pub fn has_lost_commits(&self) -> bool {
        !self.shared.loses_commits.load(Ordering::Relaxed)
    }

    pub fn carried(&self) -> usize {
        self.shared.carried.load(Ordering::Relaxed)
    }

    pub fn answered(&self) -> usize {
        self.shared.answered.load(Ordering::Relaxed)
    }
}

impl Drop for HeartbeatProxy {
    fn drop(&mut self) {
        self.server.abort();
    }
}

type Client = tokio::sync::Mutex<OwnedWriteHalf>;
/// The correlation id of the answer that gets lost on a connection.
type Lost = Mutex<Option<Vec<u8>>>;

async fn carry(client: TcpStream, shared: Arc<Shared>) {
    let upstream = shared.upstream.lock().unwrap().clone();
    let Ok(server) = TcpStream::connect(upstream).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let ((requests, to_client), (answers, to_server)) = (client.into_split(), server.into_split());
    let (to_client, number) = (Client::new(to_client), shared.connections.fetch_add(1, Ordering::Relaxed));
    let lost = Lost::default();
    tokio::select! {
        _ = pass_requests(requests, to_server, &to_client, &shared, number, &lost) => {}
        _ = pass_answers(answers, &to_client, &lost) => {}
    }
}

async fn pass_requests(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    client: &Client,
    shared: &Shared,
    connection: usize,
    lost: &Lost,
) -> std::io::Result<()> {
    loop {
        let frame = read_frame(&mut from).await?;
        if is_of_client(&frame, &shared.client)
            && frame[..2] == OFFSET_FETCH.to_be_bytes()
            && shared.loses_commits.swap(false, Ordering::Relaxed)
        {
            *lost.lock().unwrap() = Some(frame[4..8].to_vec());
        }
        if let Some(answer) = all_is_well(&frame, &shared.client) {
            if connection < shared.lied_to.load(Ordering::Relaxed) {
                write_frame(&mut *client.lock().await, &answer).await?;
                shared.answered.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            shared.carried.fetch_add(1, Ordering::Relaxed);
            shared.answered.store(0, Ordering::Relaxed);
        }
        write_frame(&mut to, &frame).await?;
    }
}

async fn pass_answers(mut from: OwnedReadHalf, client: &Client, lost: &Lost) -> std::io::Result<()> {
    loop {
        let frame = read_frame(&mut from).await?;
        if lost.lock().unwrap().take_if(|id| frame[..4] == id[..]).is_some() {
            continue;
        }
        write_frame(&mut *client.lock().await, &frame).await?;
    }
}

/// Whether a request is of the client with this id.
fn is_of_client(frame: &[u8], client: &str) -> bool {
    let length = usize::try_from(i16::from_be_bytes([frame[8], frame[9]])).unwrap_or(0);
    &frame[10..10 + length] == client.as_bytes()
}

/// The answer to a heartbeat of this client that changes nothing; `None` for other requests.
fn all_is_well(frame: &[u8], client: &str) -> Option<Vec<u8>> {
    let number = |at: usize| i16::from_be_bytes([frame[at], frame[at + 1]]);
    let (kind, version, id) = (number(0), number(2), &frame[4..8]);
    let end = 10 + usize::try_from(number(8)).unwrap_or(0);
    if !is_of_client(frame, client) {
        return None;
    }
    // Throttle time and error.
    let fine = [0; 6];
    match kind {
        HEARTBEAT => {
            assert!((1..4).contains(&version), "version {version}");
            Some([id, &fine].concat())
        }
        CONSUMER_GROUP_HEARTBEAT => {
            // Tags, the group's id and the member's id stand before the member's epoch.
            let mut at = end;
            assert_eq!(unsigned(frame, &mut at), 0, "tags");
            for _ in 0..2 {
                at += unsigned(frame, &mut at).saturating_sub(1);
            }
            let (epoch, interval) = (&frame[at..at + 4], 1_000_i32.to_be_bytes());
            // No tags; neither a message nor another id; no assignment, no tags.
            Some([id, &[0], &fine, &[0, 0], epoch, &interval, &[0xff, 0]].concat())
        }
        _ => None,
    }
}
