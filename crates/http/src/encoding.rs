//! Request bodies with a `Content-Encoding`, decompressed while they are read.
//!
//! The decompressed bytes come in small pieces, so that whoever reads the body refuses what is too
//! large before it exists. What the decompressor itself holds counts against the memory budget of
//! bodies.

use std::{
    pin::Pin,
    sync::OnceLock,
    task::{Context, Poll, ready},
};

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, header},
};
use bytes::Bytes;
use flate2::{Decompress, FlushDecompress, Status};
use hyper::body::Frame;
use postrider_limits::memory::{Budget, Lease, budgets};
use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer};

use super::{
    body::{Footprint, too_large},
    code::Code,
    problem::Problem,
};

/// Encodings that are accepted, for the header `Accept-Encoding` of a refusal (RFC 7694).
pub const ACCEPTED: &str = "gzip, deflate, zstd";
/// Largest decompressed piece, in bytes.
const PIECE: usize = 16 << 10;
/// Pieces of one compressed frame after which other tasks have their turn.
const TURN: u32 = 64;
/// Compressed bytes after which there must be content, such as after empty members or frames. A
/// block of zstd has up to 128 KiB.
const MAX_SILENT: usize = 256 << 10;
/// Memory of a zstd decompressor besides its window, in bytes: its tables, one block compressed and
/// one not.
const ZSTD_BYTES: usize = 448 << 10;
/// Part of the budget for bodies that decompressors may take together.
const SHARE: usize = 4;
/// Memory of a decompressor that is refused if the share is half used, in bytes.
const LARGE: usize = 1 << 20;
/// Largest window of a zstd frame, as a power of two: 8 MiB (RFC 9659).
const ZSTD_WINDOW: u32 = 23;
/// Memory of a decompressor of gzip or deflate, in bytes: zlib's window and tables.
const INFLATE_BYTES: usize = 48 << 10;

/// An encoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Coding {
    Gzip,
    Deflate,
    Zstd,
}

impl Coding {
    /// Returns the encoding of a body; `None` if it is plain.
    fn of(headers: &HeaderMap) -> Result<Option<Self>, Problem> {
        let values = headers.get_all(header::CONTENT_ENCODING).iter();
        let names = values.flat_map(|value| value.as_bytes().split(|&byte| byte == b',')).map(<[u8]>::trim_ascii);
        let mut coding = None;
        for name in names.filter(|name| !is_plain(name)) {
            let one = match name.to_ascii_lowercase().as_slice() {
                b"gzip" | b"x-gzip" => Self::Gzip,
                b"deflate" => Self::Deflate,
                b"zstd" => Self::Zstd,
                _ => {
                    let name = String::from_utf8_lossy(name);
                    return Err(refused(&format!(
                        "content encoding `{name}` is not supported; send one of {ACCEPTED}"
                    )));
                }
            };
            if coding.replace(one).is_some() {
                return Err(refused("the body must have only one content encoding"));
            }
        }
        Ok(coding)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Deflate => "deflate",
            Self::Zstd => "zstd",
        }
    }
}

/// Returns whether a name is of no encoding. Many clients send a charset or a media type by
/// mistake.
fn is_plain(name: &[u8]) -> bool {
    let plain: [&[u8]; 5] = [b"", b"identity", b"none", b"utf-8", b"utf8"];
    name.contains(&b'/') || plain.iter().any(|plain| name.eq_ignore_ascii_case(plain))
}

fn refused(detail: &str) -> Problem {
    Problem::new(Code::UNSUPPORTED_ENCODING, detail).at_header("Content-Encoding")
}

/// Leases of a decompressor: on the budget for bodies, and on the decompressors' own share of it,
/// so that stalled ones leave memory for bodies without an encoding.
#[derive(Default)]
struct Leases {
    footprint: Footprint,
    share: Option<Lease>,
}

impl Leases {
    /// Extends the leases to this many bytes, if they cover less. 503 when the share is used up.
    fn cover(&mut self, bytes: usize) -> Result<(), Problem> {
        static SHARED: OnceLock<Budget> = OnceLock::new();
        let shared = SHARED.get_or_init(|| Budget::new("decompression", budgets().requests.bound() / SHARE));
        let covered = match &mut self.share {
            Some(lease) if lease.bytes() >= bytes => true,
            _ if bytes > LARGE && shared.is_tight() => false,
            Some(lease) => lease.grow(bytes - lease.bytes()),
            none => {
                *none = shared.lease(bytes);
                none.is_some()
            }
        };
        if !covered {
            return Err(Problem::new(
                Code::OVERLOADED,
                "the memory budget for decompression is used up; retry later, or send the body uncompressed",
            ));
        }
        self.footprint.cover(bytes)
    }
}

/// Returns the body of a request, decompressed if it has an encoding. Errors of the body itself are
/// [problems](Problem), see [`broken`]. `max_bytes` is the limit of a body that is read as a whole;
/// its compressed bytes may be some more.
pub fn plain(request: Request, max_bytes: Option<usize>) -> Result<Body, Problem> {
    if !request.headers().contains_key(header::CONTENT_ENCODING) {
        return Ok(request.into_body());
    }
    let Some(coding) = Coding::of(request.headers())? else { return Ok(request.into_body()) };
    let (decoder, bytes) = Decoder::new(coding)?;
    let mut leases = Leases::default();
    leases.cover(bytes)?;
    Ok(Body::new(Decompressed {
        body: request.into_body(),
        coding,
        input: Bytes::new(),
        decoder,
        piece: vec![0; PIECE],
        more: false,
        is_complete: true,
        turn: 0,
        taken: 0,
        silent: 0,
        made: 0,
        max_bytes,
        leases,
    }))
}

/// Returns the problem of a body that broke off, or that is not what its encoding says.
pub fn broken(error: axum::Error) -> Problem {
    match error.into_inner().downcast::<Problem>() {
        Ok(problem) => *problem,
        Err(error) => Problem::new(Code::INVALID_BODY, error.to_string()),
    }
}

/// A decompressor.
enum Decoder {
    /// Before the first byte, which shows which of two formats goes by the name `deflate`.
    Deflate,
    Inflate(Decompress),
    Zstd(DCtx<'static>),
}

/// Input and output of one step, in bytes.
struct Step {
    taken: usize,
    made: usize,
    /// True if the input may end here.
    is_complete: bool,
}

impl Decoder {
    /// Returns the decompressor, and the bytes of memory that it takes.
    fn new(coding: Coding) -> Result<(Self, usize), Problem> {
        let decoder = match coding {
            Coding::Gzip => Self::Inflate(Decompress::new_gzip(15)),
            Coding::Deflate => Self::Deflate,
            Coding::Zstd => {
                let no_memory = || Problem::new(Code::OVERLOADED, "there is no memory to decompress the body");
                let mut context = DCtx::try_create().ok_or_else(no_memory)?;
                context
                    .set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW))
                    .map_err(|code| Problem::new(Code::INTERNAL, zstd_safe::get_error_name(code)))?;
                return Ok((Self::Zstd(context), PIECE));
            }
        };
        Ok((decoder, PIECE + INFLATE_BYTES))
    }

    fn step(&mut self, coding: Coding, input: &[u8], output: &mut [u8]) -> Result<Step, Problem> {
        let corrupt =
            |what: &str| Problem::new(Code::INVALID_BODY, format!("the body is not valid {}: {what}", coding.name()));
        if let (Self::Deflate, Some(first)) = (&*self, input.first()) {
            // RFC 9110 means zlib's format, and some clients send the bare one.
            *self = Self::Inflate(Decompress::new(first & 0x0f == 8));
        }
        match self {
            Self::Deflate => Ok(Step { taken: 0, made: 0, is_complete: true }),
            Self::Inflate(inflate) => {
                let (before_in, before_out) = (inflate.total_in(), inflate.total_out());
                let status = inflate
                    .decompress(input, output, FlushDecompress::None)
                    .map_err(|error| corrupt(&error.to_string()))?;
                let taken = (inflate.total_in() - before_in) as usize;
                let made = (inflate.total_out() - before_out) as usize;
                let is_complete = status == Status::StreamEnd;
                if is_complete && coding == Coding::Gzip {
                    // Another member may follow.
                    *inflate = Decompress::new_gzip(15);
                } else if taken == 0 && made == 0 && !input.is_empty() {
                    return Err(corrupt("there is more after its end"));
                }
                Ok(Step { taken, made, is_complete })
            }
            Self::Zstd(context) => {
                let mut input = InBuffer::around(input);
                let mut output = OutBuffer::around(output);
                let hint = context
                    .decompress_stream(&mut output, &mut input)
                    .map_err(|code| corrupt(zstd_safe::get_error_name(code)))?;
                Ok(Step { taken: input.pos(), made: output.pos(), is_complete: hint == 0 })
            }
        }
    }

    /// Returns the bytes of memory that the decompressor takes after it made this many, if they
    /// change. The part of a window that was never written takes none.
    fn bytes(&self, made: usize) -> usize {
        if let Self::Zstd(context) = self { PIECE + context.sizeof().min(ZSTD_BYTES + made) } else { 0 }
    }
}

struct Decompressed {
    body: Body,
    coding: Coding,
    /// Rest of the compressed frame.
    input: Bytes,
    decoder: Decoder,
    /// Buffer for one piece.
    piece: Vec<u8>,
    /// True if the decompressor may have more for the input that it took.
    more: bool,
    /// True if the input may end here.
    is_complete: bool,
    /// Pieces since the last turn of other tasks.
    turn: u32,
    /// Compressed bytes so far, and those since the last content.
    taken: usize,
    silent: usize,
    /// Decompressed bytes so far.
    made: usize,
    max_bytes: Option<usize>,
    leases: Leases,
}

impl Decompressed {
    /// Returns the next piece; empty if more input is needed.
    fn next_piece(&mut self) -> Result<Bytes, Problem> {
        while !self.input.is_empty() || self.more {
            let step = self.decoder.step(self.coding, &self.input, &mut self.piece)?;
            drop(self.input.split_to(step.taken));
            self.count(&step)?;
            self.is_complete = step.is_complete;
            self.more = step.made == self.piece.len() && !step.is_complete;
            if step.made > 0 {
                return Ok(Bytes::copy_from_slice(&self.piece[..step.made]));
            }
        }
        Ok(Bytes::new())
    }

    fn count(&mut self, step: &Step) -> Result<(), Problem> {
        self.taken += step.taken;
        self.made += step.made;
        self.silent = if step.made > 0 { 0 } else { self.silent + step.taken };
        if let Some(max_bytes) = self.max_bytes.filter(|max_bytes| self.taken > max_bytes + MAX_SILENT) {
            return Err(too_large("compressed body", Some(self.taken as u64), max_bytes));
        }
        if self.silent > MAX_SILENT {
            let detail = format!("the compressed body has more than {MAX_SILENT} bytes without content");
            return Err(Problem::new(Code::BODY_TOO_LARGE, detail));
        }
        self.leases.cover(self.decoder.bytes(self.made))
    }
}

impl hyper::body::Body for Decompressed {
    type Data = Bytes;
    type Error = Problem;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Problem>>> {
        let this = self.get_mut();
        loop {
            if this.turn >= TURN {
                this.turn = 0;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            match this.next_piece() {
                Ok(piece) if piece.is_empty() => {}
                Ok(piece) => {
                    this.turn += 1;
                    return Poll::Ready(Some(Ok(Frame::data(piece))));
                }
                Err(problem) => return Poll::Ready(Some(Err(problem))),
            }
            match ready!(hyper::body::Body::poll_frame(Pin::new(&mut this.body), cx)) {
                Some(Ok(frame)) => this.input = frame.into_data().unwrap_or_default(),
                Some(Err(error)) => return Poll::Ready(Some(Err(broken(error)))),
                None if this.is_complete => return Poll::Ready(None),
                None => {
                    let detail = format!("the body is not valid {}: it is cut off", this.coding.name());
                    return Poll::Ready(Some(Err(Problem::new(Code::INVALID_BODY, detail))));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
