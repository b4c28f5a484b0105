//! A TCP proxy on 127.0.0.1 that can go wrong in one direction only.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering},
};

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
    /// The same, and no connection that was open meanwhile is ever closed or heard of again, as when a router
    /// has forgotten it: not even that the server ends it gets through.
    BlackHole,
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
        Self::start_at("127.0.0.1").await
    }

    /// The same at another address of this machine.
    pub async fn start_at(address: &str) -> Self {
        let listener = TcpListener::bind((address, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (upstream, to) = watch::channel(String::new());
        let (mode, watched) = watch::channel(Mode::Pass);
        let server = tokio::spawn(accept(listener, move |client| carry(client, to.clone(), watched.clone())));
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

/// Carries every connection that comes, each in a task of its own that ends with this.
pub async fn accept<F: Future<Output = ()> + Send + 'static>(listener: TcpListener, carry: impl Fn(TcpStream) -> F) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((client, _)) = accepted {
                    connections.spawn(carry(client));
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
        let ((requests, answers), (server_answers, server)) = (client.into_split(), server.into_split());
        let silent = AtomicBool::new(false);
        tokio::select! {
            () = ask(requests, server, &silent) => {}
            () = answer(server_answers, answers, mode, &silent) => {}
        }
    };
    tokio::select! {
        () = whole => {}
        _ = watched.wait_for(|mode| *mode == Mode::Down) => {}
    }
}

/// Carries requests until the client ends, or the server where that gets through.
async fn ask(mut client: OwnedReadHalf, mut server: OwnedWriteHalf, silent: &AtomicBool) {
    let _ = tokio::io::copy(&mut client, &mut server).await;
    if silent.load(Ordering::Relaxed) {
        let _ = tokio::io::copy(&mut client, &mut tokio::io::sink()).await;
    }
}

/// Carries what comes back, until something is lost or the connection ends.
async fn answer(
    mut server: OwnedReadHalf,
    mut client: OwnedWriteHalf,
    mut mode: watch::Receiver<Mode>,
    silent: &AtomicBool,
) {
    let (mut buffer, mut missed) = (vec![0; 1 << 16], false);
    loop {
        let now = *mode.borrow_and_update();
        if now == Mode::BlackHole {
            silent.store(true, Ordering::Relaxed);
            while matches!(server.read(&mut buffer).await, Ok(1..)) {}
            // The client's own end is what ends it.
            return std::future::pending().await;
        }
        if missed && now != Mode::MuteResponses {
            return;
        }
        tokio::select! {
            read = server.read(&mut buffer) => {
                let Ok(count @ 1..) = read else {
                    // An end that comes together with the fault is not heard of either.
                    if *mode.borrow() == Mode::BlackHole {
                        continue;
                    }
                    return;
                };
                match *mode.borrow() {
                    Mode::Pass if !missed => {}
                    Mode::MuteResponses => {
                        missed = true;
                        continue;
                    }
                    Mode::BlackHole => continue,
                    _ => return,
                }
                if client.write_all(&buffer[..count]).await.is_err() {
                    return;
                }
            }
            changed = mode.changed() => {
                if changed.is_err() {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    /// A server that sends back what it gets.
    async fn echo() -> (SocketAddr, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                connections.spawn(async move {
                    let (mut from, mut to) = stream.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        (address, server)
    }

    /// Whether the connection brings back a byte; `None` while nothing comes and nothing ends.
    async fn ask(client: &mut TcpStream, patience: Duration) -> Option<bool> {
        let _ = client.write_all(b"?").await;
        let mut byte = [0];
        timeout(patience, client.read(&mut byte)).await.ok().map(|read| matches!(read, Ok(1)))
    }

    #[tokio::test]
    async fn a_black_hole_is_silent_for_ever_and_closes_nothing_and_new_connections_are_good_afterwards() {
        const SHORT: Duration = Duration::from_millis(200);
        const LONG: Duration = Duration::from_secs(10);
        let (address, server) = echo().await;
        let proxy = Proxy::start().await;
        proxy.lead_to(&address.to_string());
        let mut before = TcpStream::connect(proxy.address).await.unwrap();
        assert_eq!(ask(&mut before, LONG).await, Some(true));
        proxy.set(Mode::BlackHole);
        let mut during = TcpStream::connect(proxy.address).await.unwrap();
        assert_eq!(ask(&mut before, SHORT).await, None);
        assert_eq!(ask(&mut during, SHORT).await, None);
        proxy.set(Mode::Pass);
        assert_eq!(ask(&mut before, SHORT).await, None);
        server.abort();
        assert_eq!(ask(&mut during, SHORT).await, None, "not even the server's end is heard of");
        let (address, _server) = echo().await;
        proxy.lead_to(&address.to_string());
        let mut after = TcpStream::connect(proxy.address).await.unwrap();
        assert_eq!(ask(&mut after, LONG).await, Some(true));
    }
}
