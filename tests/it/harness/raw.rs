//! Raw bytes over TCP, for requests that no HTTP client would send.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

/// A TCP connection.
pub struct Raw {
    stream: TcpStream,
    /// Bytes that were read but not yet returned.
    ahead: Vec<u8>,
}

/// A response as text.
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

    /// Like [`Raw::connect`], with a small receive buffer.
    pub async fn narrow(url: &str) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4_096).unwrap();
        let stream = socket.connect(url.trim_start_matches("http://").parse().unwrap()).await.unwrap();
        Self { stream, ahead: Vec::new() }
    }

    /// Sends bytes, and returns whether that succeeded.
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.stream.write_all(bytes.as_ref()).await.is_ok()
    }

    /// Closes the sending side. The connection can still be read.
    pub async fn half_close(&mut self) {
        self.stream.shutdown().await.unwrap();
    }

    /// Returns the next response, or `None` if the connection ends. Supports only bodies with a
    /// Content-Length.
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

    /// Returns whether the server closes the connection within this time.
    pub async fn closes(&mut self, within: Duration) -> bool {
        self.read_until(within, |_| None).await.is_none()
    }

    /// Returns the received bytes once they are `enough`.
    pub async fn until(&mut self, within: Duration, enough: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let read = self.read_until(within, |bytes| enough(bytes).then_some(bytes.len())).await;
        read.map(|count| self.ahead.drain(..count).collect()).expect("the server closes instead")
    }

    /// Returns all remaining bytes with their framing, and whether the connection ended rather than
    /// fell silent.
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

    /// Returns the rest of a chunked response with its framing, up to its end.
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
