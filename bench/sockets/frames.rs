//! WebSocket frames for benchmarks, without support for fragmented messages.

pub const TEXT: u8 = 1;
pub const CLOSE: u8 = 8;
pub const PING: u8 = 9;
pub const PONG: u8 = 10;

/// Iterates over the complete frames in bytes from a server; `rest` returns the incomplete remainder.
pub struct Frames<'a>(&'a [u8]);

impl<'a> Frames<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub fn rest(&self) -> &'a [u8] {
        self.0
    }
}

impl<'a> Iterator for Frames<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (&[opcode, length], more) = self.0.split_first_chunk()?;
        let (length, more) = match length {
            126 => more.split_first_chunk().map(|(bytes, more)| (u64::from(u16::from_be_bytes(*bytes)), more))?,
            127 => more.split_first_chunk().map(|(bytes, more)| (u64::from_be_bytes(*bytes), more))?,
            short => (u64::from(short), more),
        };
        let (payload, rest) = more.split_at_checked(length as usize)?;
        self.0 = rest;
        Some((opcode & 15, payload))
    }
}

/// Builds a client's frame of less than 64 KiB. Its mask is zero, which is valid and changes nothing.
pub fn masked(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x80 | opcode];
    match payload.len() {
        short if short < 126 => frame.push(0x80 | short as u8),
        long => {
            frame.push(0x80 | 126);
            frame.extend_from_slice(&(long as u16).to_be_bytes());
        }
    }
    frame.extend_from_slice(&[0; 4]);
    frame.extend_from_slice(payload);
    frame
}
