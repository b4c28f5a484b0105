//! A TCP proxy on 127.0.0.1 that can fail in one direction only.

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

/// The behavior of the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Pass,
    /// Closes every connection.
    Down,
    /// Forwards requests. The first response bytes are dropped and close the connection.
    CutResponses,
    /// Forwards requests and drops responses. Connections that missed a response are closed
    /// afterwards.
    MuteResponses,
    /// Like `MuteResponses`, but connections that are open meanwhile stay silent for ever, as if a
    /// router had lost their state: not even a close by the server gets through.
    BlackHole,
}

/// A running proxy, which stops on drop.
pub struct Proxy {
    pub address: SocketAddr,
    upstream: watch::Sender<String>,
    mode: watch::Sender<Mode>,
    server: JoinHandle<()>,
}

impl Proxy {
    /// Starts to listen. Connections are closed until there is an upstream.
    pub async fn start() -> Self {
        Self::start_at("127.0.0.1").await
    }

    /// Like [`Proxy::start`], on another address of this machine.
    pub async fn start_at(address: &str) -> Self {
        let listener = TcpListener::bind((address, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (upstream, to) = watch::channel(String::new());
        let (mode, watched) = watch::channel(Mode::Pass);
        let server = tokio::spawn(accept(listener, move |client| carry(client, to.clone(), watched.clone())));
        Self { address, upstream, mode, server }
    }

    /// Sets the upstream of new connections, as `host:port`.
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

/// Accepts connections for ever, and handles each in its own task. Drop ends all of them.
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
        // Without `TCP_NODELAY`, small packets of one direction wait for the other.
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

/// Forwards requests until the client closes the connection, or the server does and the mode lets
/// that through.
async fn ask(mut client: OwnedReadHalf, mut server: OwnedWriteHalf, silent: &AtomicBool) {
    let _ = tokio::io::copy(&mut client, &mut server).await;
    if silent.load(Ordering::Relaxed) {
        let _ = tokio::io::copy(&mut client, &mut tokio::io::sink()).await;
    }
}

/// Forwards responses until one is dropped or the connection ends.
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
            // Only the client can end the connection now.
            return std::future::pending().await;
        }
        if missed && now != Mode::MuteResponses {
            return;
        }
        tokio::select! {
            read = server.read(&mut buffer) => {
                let Ok(count @ 1..) = read else {
                    // A close that comes together with the fault does not get through either.
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

    /// Starts a server that echoes all bytes.
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

    /// Returns whether the connection echoes a byte; `None` if it stays open and silent.
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
