//! A TCP proxy on 127.0.0.1 that can go wrong in one direction only.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::{JoinHandle, JoinSet},
};

/// What becomes of the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Pass,
    /// Every connection is closed.
    Down,
    /// Requests go through; the first bytes that come back end the connection and are lost.
    CutResponses,
    /// Requests go through, and nothing comes back. Who has missed something is closed afterwards.
    MuteResponses,
}

/// Ends when it is dropped.
pub struct Proxy {
    pub address: SocketAddr,
    upstream: watch::Sender<String>,
    mode: watch::Sender<Mode>,
    server: JoinHandle<()>,
}

impl Proxy {
    /// Listens; connections are closed until there is an upstream.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (upstream, to) = watch::channel(String::new());
        let (mode, watched) = watch::channel(Mode::Pass);
        let server = tokio::spawn(accept(listener, to, watched));
        Self { address, upstream, mode, server }
    }

    /// Where connections go from now on, as `host:port`.
    pub fn lead_to(&self, upstream: &str) {
        self.upstream.send_replace(upstream.to_owned());
    }

    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn accept(listener: TcpListener, upstream: watch::Receiver<String>, mode: watch::Receiver<Mode>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((client, _)) = accepted {
                    connections.spawn(carry(client, upstream.clone(), mode.clone()));
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn carry(client: TcpStream, upstream: watch::Receiver<String>, mode: watch::Receiver<Mode>) {
    let mut watched = mode.clone();
    let whole = async {
        let upstream = upstream.borrow().clone();
        let Ok(server) = TcpStream::connect(upstream).await else { return };
        // Without it, small packets of one direction wait for the other.
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        let ((mut requests, answers), (server_answers, mut server)) = (client.into_split(), server.into_split());
        tokio::select! {
            _ = tokio::io::copy(&mut requests, &mut server) => {}
            () = answer(server_answers, answers, mode) => {}
        }
    };
    tokio::select! {
        () = whole => {}
        _ = watched.wait_for(|mode| *mode == Mode::Down) => {}
    }
}

/// Carries what comes back, until something is lost or the connection ends.
async fn answer(mut server: OwnedReadHalf, mut client: OwnedWriteHalf, mut mode: watch::Receiver<Mode>) {
    let (mut buffer, mut missed) = (vec![0; 1 << 16], false);
    loop {
        tokio::select! {
            read = server.read(&mut buffer) => {
                let Ok(count @ 1..) = read else { return };
                let now = *mode.borrow();
                match now {
                    Mode::Pass if !missed => {
                        if client.write_all(&buffer[..count]).await.is_err() {
                            return;
                        }
                    }
                    Mode::MuteResponses => missed = true,
                    _ => return,
                }
            }
            changed = mode.changed() => {
                if changed.is_err() || (missed && *mode.borrow() != Mode::MuteResponses) {
                    return;
                }
            }
        }
    }
}
