//! Closes a connection without losing the answer.
//!
//! An answer may be sent before its request was read to the end, for example when the body is too
//! large. Closing a socket with unread bytes resets the connection, and the reset can overtake the
//! answer. So the bytes that the peer still sends are first read and discarded for a while.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, ReadBuf},
    net::TcpStream,
    time::Sleep,
};

/// Time for the peer to finish sending, or to read the answer and close.
const PATIENCE: Duration = Duration::from_secs(5);
/// Maximum number of discarded bytes.
const MAX_DISCARDED: usize = 32 << 20;

/// Closing of one connection, after its write side was shut down.
#[derive(Default)]
pub struct Linger {
    patience: Option<Pin<Box<Sleep>>>,
    discarded: usize,
}

impl Linger {
    /// Ready when the socket may be closed. `expecting` means that the peer was in the middle of a
    /// request; otherwise only bytes that have already arrived are read.
    pub fn poll(&mut self, stream: &mut TcpStream, expecting: bool, cx: &mut Context<'_>) -> Poll<()> {
        let mut scratch = [0; 16 << 10];
        while self.discarded < MAX_DISCARDED {
            let mut buffer = ReadBuf::new(&mut scratch);
            match Pin::new(&mut *stream).poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => self.discarded += buffer.filled().len(),
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending if expecting || self.discarded > 0 => {
                    let patience = self.patience.get_or_insert_with(|| Box::pin(tokio::time::sleep(PATIENCE)));
                    return patience.as_mut().poll(cx);
                }
                Poll::Pending => return Poll::Ready(()),
            }
        }
        Poll::Ready(())
    }
}
