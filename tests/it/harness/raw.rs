//! Bytes over TCP, for what no HTTP client would send.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

/// A connection.
pub struct Raw {
    stream: TcpStream,
    /// Read, but not asked for yet.
    ahead: Vec<u8>,
}

/// An answer as text: enough to look at.
#[derive(Debug)]
pub struct RawAnswer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Raw {
    /// Connects to `http://host:port`.
    pub async fn connect(url: &str) -> Self {
        let stream = TcpStream::connect(url.trim_start_matches("http://")).await.unwrap();
        Self { stream, ahead: Vec::new() }
    }

    /// The same, where little is on its way to it at a time.
    pub async fn narrow(url: &str) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4_096).unwrap();
        let stream = socket.connect(url.trim_start_matches("http://").parse().unwrap()).await.unwrap();
        Self { stream, ahead: Vec::new() }
    }

    /// Whether it could still be sent.
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.stream.write_all(bytes.as_ref()).await.is_ok()
    }

    /// Says that nothing more will be sent, and goes on reading.
    pub async fn half_close(&mut self) {
        self.stream.shutdown().await.unwrap();
    }

    /// The next answer; `None` when the connection ends instead. Bodies by Content-Length only.
    pub async fn answer(&mut self, within: Duration) -> Option<RawAnswer> {
        let head_end = self.read_until(within, |bytes| find(bytes, b"\r\n\r\n").map(|at| at + 4)).await?;
        let head = String::from_utf8_lossy(&self.ahead[..head_end]).into_owned();
        let length = head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
        });
        let end = head_end + length.unwrap_or(0);
        self.read_until(within, |bytes| (bytes.len() >= end).then_some(end)).await?;
        let body = String::from_utf8_lossy(&self.ahead[head_end..end]).into_owned();
        self.ahead.drain(..end);
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some(RawAnswer { status, head, body })
    }

    /// Whether the other side closes within this time.
    pub async fn closes(&mut self, within: Duration) -> bool {
        self.read_until(within, |_| None).await.is_none()
    }

    /// What has come once it is enough.
    pub async fn until(&mut self, within: Duration, enough: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let read = self.read_until(within, |bytes| enough(bytes).then_some(bytes.len())).await;
        read.map(|count| self.ahead.drain(..count).collect()).expect("the server closes instead")
    }

    /// Everything that still comes, framing included, and whether it ended rather than fell silent.
    pub async fn rest(&mut self, silence: Duration) -> (Vec<u8>, bool) {
        let mut received = std::mem::take(&mut self.ahead);
        loop {
            let mut buffer = [0; 65_536];
            match timeout(silence, self.stream.read(&mut buffer)).await {
                Err(_) => return (received, false),
                Ok(Ok(0) | Err(_)) => return (received, true),
                Ok(Ok(count)) => received.extend_from_slice(&buffer[..count]),
            }
        }
    }

    /// Everything that still comes of an answer in chunks, framing included, up to its end.
    pub async fn last_chunks(&mut self) -> Vec<u8> {
        let end = |bytes: &[u8]| bytes.ends_with(b"\r\n0\r\n\r\n").then_some(bytes.len());
        self.read_until(Duration::from_secs(20), end).await;
        std::mem::take(&mut self.ahead)
    }

    async fn read_until(&mut self, within: Duration, done: impl Fn(&[u8]) -> Option<usize>) -> Option<usize> {
        loop {
            if let Some(at) = done(&self.ahead) {
                return Some(at);
            }
            let mut buffer = [0; 8192];
            let read = timeout(within, self.stream.read(&mut buffer));
            match read.await.expect("the server says nothing and keeps the connection") {
                Ok(0) | Err(_) => return None,
                Ok(count) => self.ahead.extend_from_slice(&buffer[..count]),
            }
        }
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}
