//! Closing without losing the answer.
//!
//! An answer may come before its request was read to the end, as with a body that is too large.
//! Closing a socket that holds unread bytes resets it, and the reset can overtake the answer; so what
//! the peer still sends is read and thrown away for a while first.

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

/// For the peer to finish sending, or to read the answer and hang up.
const PATIENCE: Duration = Duration::from_secs(5);
/// Thrown away at most, in bytes.
const MAX_DISCARDED: usize = 32 << 20;

/// The end of one connection, after its writing side was shut down.
#[derive(Default)]
pub struct Linger {
    patience: Option<Pin<Box<Sleep>>>,
    discarded: usize,
}

impl Linger {
    /// Ready when the socket may be closed. `expecting` says that the peer was in the middle of
    /// something; otherwise only what has already arrived is looked at.
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
