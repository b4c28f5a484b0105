//! A proxy in front of a broker that removes the brokers from metadata responses. A broker that has
//! just started answers like this: it knows its topics before it knows of any live broker.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinHandle,
};

use super::proxy::accept;

/// Kafka's API key of the metadata request, and its first version with compact encodings.
const METADATA: i16 = 3;
const FLEXIBLE: i16 = 9;

/// A running proxy, which stops on drop.
pub struct MetadataProxy {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    upstream: Mutex<String>,
    /// Whether brokers are hidden. Each time this is set to true, all connections are closed.
    hides: watch::Sender<bool>,
    /// The time at which each client, by id, last got a response without brokers.
    told: Mutex<BTreeMap<String, Instant>>,
}

impl MetadataProxy {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::<Shared>::default();
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

    /// Closes all connections. New ones get metadata without brokers.
    pub fn hide_brokers(&self) {
        self.shared.hides.send_replace(true);
    }

    /// Forwards responses unchanged again. Connections stay open: a client that lost its brokers
    /// has none.
    pub fn show_brokers(&self) {
        self.shared.hides.send_replace(false);
    }

    /// Returns whether a client is stuck: it got a response without brokers at least `silent_for`
    /// ago, and has got none since.
    pub fn is_lost(&self, client: &str, silent_for: Duration) -> bool {
        self.shared.told.lock().unwrap().get(client).is_some_and(|at| at.elapsed() >= silent_for)
    }
}

impl Drop for MetadataProxy {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn carry(client: TcpStream, shared: Arc<Shared>) {
    let upstream = shared.upstream.lock().unwrap().clone();
    let Ok(server) = TcpStream::connect(upstream).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let ((requests, to_client), (answers, to_server)) = (client.into_split(), server.into_split());
    let (mut hides, asked) = (shared.hides.subscribe(), Mutex::default());
    hides.mark_unchanged();
    let ended = async {
        while hides.changed().await.is_ok() {
            if *hides.borrow() {
                return;
            }
        }
    };
    tokio::select! {
        _ = pass_requests(requests, to_server, &asked) => {}
        _ = pass_answers(answers, to_client, &asked, &shared) => {}
        () = ended => {}
    }
}

/// Pending metadata requests: version and client by correlation id.
type Asked = Mutex<BTreeMap<i32, (i16, String)>>;

async fn pass_requests(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, asked: &Asked) -> std::io::Result<()> {
    loop {
        let frame = read_frame(&mut from).await?;
        let number = |at: usize| i16::from_be_bytes([frame[at], frame[at + 1]]);
        if number(0) == METADATA {
            let id = i32::from_be_bytes([frame[4], frame[5], frame[6], frame[7]]);
            let length = usize::try_from(number(8)).unwrap_or(0);
            let client = String::from_utf8_lossy(&frame[10..10 + length]).into_owned();
            asked.lock().unwrap().insert(id, (number(2), client));
        }
        write_frame(&mut to, &frame).await?;
    }
}

async fn pass_answers(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    asked: &Asked,
    shared: &Shared,
) -> std::io::Result<()> {
    loop {
        let mut frame = read_frame(&mut from).await?;
        let id = i32::from_be_bytes([frame[0], frame[1], frame[2], frame[3]]);
        let metadata = asked.lock().unwrap().remove(&id);
        if let Some((version, client)) = metadata
            && *shared.hides.borrow()
        {
            assert!(version >= FLEXIBLE, "{client} asks for metadata in version {version}");
            frame = without_brokers(&frame);
            shared.told.lock().unwrap().insert(client, Instant::now());
        }
        write_frame(&mut to, &frame).await?;
    }
}

/// Returns the response with an empty list of brokers. The list follows the correlation id, the
/// header's tags (none) and the throttle time; each broker is an id, a host, a port, a rack and
/// tags (none).
fn without_brokers(frame: &[u8]) -> Vec<u8> {
    let list = 4 + 1 + 4;
    let mut at = list;
    let brokers = unsigned(frame, &mut at) - 1;
    for _ in 0..brokers {
        at += 4;
        at += unsigned(frame, &mut at).saturating_sub(1);
        at += 4;
        at += unsigned(frame, &mut at).saturating_sub(1);
        assert_eq!(unsigned(frame, &mut at), 0, "tags");
    }
    [&frame[..list], &[1], &frame[at..]].concat()
}

/// Reads a variable-length number and advances `at` past it.
pub fn unsigned(frame: &[u8], at: &mut usize) -> usize {
    let (mut value, mut shift) = (0, 0);
    loop {
        let byte = frame[*at];
        *at += 1;
        value |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return value;
        }
        shift += 7;
    }
}

pub async fn read_frame(from: &mut OwnedReadHalf) -> std::io::Result<Vec<u8>> {
    let mut frame = vec![0; usize::try_from(from.read_i32().await?).unwrap_or(0)];
    from.read_exact(&mut frame).await?;
    Ok(frame)
}

pub async fn write_frame(to: &mut OwnedWriteHalf, frame: &[u8]) -> std::io::Result<()> {
    to.write_i32(i32::try_from(frame.len()).unwrap()).await?;
    to.write_all(frame).await
}
