//! A proxy in front of a broker that answers the heartbeats of a group member itself, with success:
//! the broker expels the member, and the member does not notice. It can also drop one response to a
//! member that fetches committed offsets.

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

/// Kafka's API keys of OffsetFetch, and of the heartbeats of classic and of KIP-848 groups.
const OFFSET_FETCH: i16 = 9;
const HEARTBEAT: i16 = 12;
const CONSUMER_GROUP_HEARTBEAT: i16 = 68;

/// A running proxy, which stops on drop.
pub struct HeartbeatProxy {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    upstream: Mutex<String>,
    /// The id of the client whose heartbeats the proxy handles.
    client: String,
    /// Number of connections so far, and how many of the first ones get the proxy's own answers.
    connections: AtomicUsize,
    lied_to: AtomicUsize,
    /// Number of the client's heartbeats that reached the broker.
    carried: AtomicUsize,
    /// Number of heartbeats that the proxy has answered since the last one that reached the broker.
    answered: AtomicUsize,
    /// Whether the proxy drops the next OffsetFetch response.
    loses_commits: AtomicBool,
}

impl HeartbeatProxy {
    /// Starts a proxy for the client with this id.
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

    /// Sets the upstream of new connections, as `host:port`.
    pub fn lead_to(&self, upstream: &str) {
        upstream.clone_into(&mut self.shared.upstream.lock().unwrap());
    }

    /// Answers heartbeats on the connections that are open now, and forwards those of later
    /// connections.
    pub fn lie(&self) {
        self.shared.lied_to.store(self.shared.connections.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Drops the next OffsetFetch response.
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
/// The correlation id of the response to drop on a connection.
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

/// Returns whether a request is from the client with this id.
fn is_of_client(frame: &[u8], client: &str) -> bool {
    let length = usize::try_from(i16::from_be_bytes([frame[8], frame[9]])).unwrap_or(0);
    &frame[10..10 + length] == client.as_bytes()
}

/// Returns a success response to a heartbeat of this client; `None` for other requests.
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
            // The tags, the group id and the member id precede the member epoch.
            let mut at = end;
            assert_eq!(unsigned(frame, &mut at), 0, "tags");
            for _ in 0..2 {
                at += unsigned(frame, &mut at).saturating_sub(1);
            }
            let (epoch, interval) = (&frame[at..at + 4], 1_000_i32.to_be_bytes());
            // No tags, no error message, no new member id, no assignment, no tags.
            Some([id, &[0], &fine, &[0, 0], epoch, &interval, &[0xff, 0]].concat())
        }
        _ => None,
    }
}
