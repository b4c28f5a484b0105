use std::io::Write;

use flate2::{
    Compression,
    write::{DeflateEncoder, GzEncoder, ZlibEncoder},
};
use futures_util::{StreamExt, stream};
use http_body_util::BodyExt;
use proptest::prelude::*;

use super::*;

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn zlib(data: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn bare_deflate(data: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn zstd(data: &[u8]) -> Vec<u8> {
    let mut out = vec![0; zstd_safe::compress_bound(data.len())];
    let length = zstd_safe::compress(&mut out[..], data, 3).unwrap();
    out.truncate(length);
    out
}

/// Reads a body that arrives in frames of this size.
async fn read(encoding: &str, body: &[u8], frame: usize) -> Result<Vec<u8>, Problem> {
    let frames: Vec<_> = body.chunks(frame).map(|frame| Ok::<_, Problem>(Bytes::copy_from_slice(frame))).collect();
    let request =
        Request::builder().header("content-encoding", encoding).body(Body::from_stream(stream::iter(frames))).unwrap();
    let collected = plain(request, None)?.collect().await.map_err(broken)?;
    Ok(collected.to_bytes().to_vec())
}

#[tokio::test]
async fn every_encoding_is_decompressed_however_it_arrives() {
    let data: Vec<u8> = (0..50_000_u32).flat_map(|number| (number / 7).to_le_bytes()).collect();
    for (encoding, body) in [
        ("gzip", gzip(&data)),
        ("X-GZIP", gzip(&data)),
        ("identity, gzip", gzip(&data)),
        ("deflate", zlib(&data)),
        ("deflate", bare_deflate(&data)),
        ("zstd", zstd(&data)),
        ("identity", data.clone()),
        ("", data.clone()),
        ("UTF-8", data.clone()),
        ("application/json", data.clone()),
        ("utf-8, gzip", gzip(&data)),
    ] {
        for frame in [1, 100, body.len()] {
            assert!(read(encoding, &body, frame).await.unwrap() == data, "{encoding} in frames of {frame}");
        }
    }
    let members = [gzip(b"one "), gzip(b"two")].concat();
    assert_eq!(read("gzip", &members, 5).await.unwrap(), b"one two");
    let frames = [zstd(b"one "), zstd(b"two")].concat();
    assert_eq!(read("zstd", &frames, 5).await.unwrap(), b"one two");
    assert_eq!(read("gzip", b"", 1).await.unwrap(), b"");
}

#[tokio::test]
async fn other_encodings_are_refused_and_name_those_that_are_not() {
    for encoding in ["br", "compress", "gzip, zstd", "gzip, gzip", "gzip;q=1"] {
        let problem = read(encoding, b"x", 1).await.unwrap_err();
        assert_eq!(problem.code, Code::UNSUPPORTED_ENCODING, "{encoding}");
        assert_eq!(problem.respond(None).headers()["accept-encoding"], ACCEPTED);
    }
}

#[tokio::test]
async fn a_body_that_is_cut_off_or_corrupt_is_malformed() {
    let data = b"some data that is not compressed much".repeat(3);
    for (encoding, body) in [("gzip", gzip(&data)), ("deflate", zlib(&data)), ("zstd", zstd(&data))] {
        for length in 1..body.len() {
            let problem = read(encoding, &body[..length], 7).await.unwrap_err();
            assert_eq!(problem.code, Code::INVALID_BODY, "{encoding}, {length} bytes: {}", problem.detail);
        }
        let trailing = [&body[..], b"trailing"].concat();
        assert_eq!(read(encoding, &trailing, 7).await.unwrap_err().code, Code::INVALID_BODY, "{encoding}");
        assert_eq!(read(encoding, b"{\"key\":1}", 100).await.unwrap_err().code, Code::INVALID_BODY, "{encoding}");
    }
}

#[tokio::test]
async fn a_bomb_comes_in_small_pieces() {
    let bomb = vec![0; 64 << 20];
    for (encoding, body) in [("gzip", gzip(&bomb)), ("zstd", zstd(&bomb))] {
        let request = Request::builder().header("content-encoding", encoding).body(Body::from(body)).unwrap();
        let mut body = plain(request, None).unwrap();
        let mut bytes = 0;
        while let Some(frame) = body.frame().await {
            let piece = frame.unwrap().into_data().unwrap();
            assert!(piece.len() <= PIECE, "{encoding}");
            bytes += piece.len();
        }
        assert_eq!(bytes, bomb.len());
    }
}

#[tokio::test]
async fn compressed_bytes_without_content_are_bounded() {
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 0xf8, 0x03, 0, 0][..], &[0; 0x3f8]].concat();
    let mut named = vec![0x1f, 0x8b, 8, 8, 0, 0, 0, 0, 0, 3];
    named.resize(1 << 20, b'a');
    for (encoding, body) in [("gzip", gzip(b"").repeat(20_000)), ("zstd", skippable.repeat(400)), ("gzip", named)] {
        let problem = read(encoding, &body, 1_000).await.unwrap_err();
        assert_eq!(problem.code, Code::BODY_TOO_LARGE, "{encoding}: {}", problem.detail);
    }
}

#[tokio::test]
async fn a_whole_body_may_not_have_many_more_compressed_bytes_than_its_limit() {
    let members = [gzip(b"").repeat(1_000), gzip(b"x")].concat().repeat(20);
    let request = Request::builder().header("content-encoding", "gzip").body(Body::from(members.clone())).unwrap();
    let error = plain(request, Some(1_000)).unwrap().collect().await.unwrap_err();
    assert_eq!(broken(error).code, Code::BODY_TOO_LARGE);
    assert_eq!(read("gzip", &members, 1_000).await.unwrap(), b"x".repeat(20), "a stream has no such limit");
}

/// Opens a body that starts with these bytes and stalls.
async fn stalled(start: &'static [u8]) -> Result<Body, Problem> {
    let frames = stream::iter([Ok::<_, Problem>(Bytes::from_static(start))]).chain(stream::pending());
    let request = Request::builder().header("content-encoding", "zstd").body(Body::from_stream(frames)).unwrap();
    let mut body = plain(request, None)?;
    let polled = std::future::poll_fn(|cx| Poll::Ready(hyper::body::Body::poll_frame(Pin::new(&mut body), cx))).await;
    match polled {
        Poll::Ready(Some(Err(error))) => Err(broken(error)),
        _ => Ok(body),
    }
}

#[tokio::test]
async fn stalled_bodies_leave_memory_for_bodies_without_an_encoding() {
    // The head of a frame with a window of 8 MiB.
    let start = &[0x28, 0xb5, 0x2f, 0xfd, 0, 0x68];
    let mut open = Vec::new();
    let refused = loop {
        match stalled(start).await {
            Ok(body) => open.push(body),
            Err(problem) => break problem,
        }
    };
    assert_eq!(refused.code, Code::OVERLOADED);
    assert!(open.len() > 20, "an empty window takes no memory: {}", open.len());
    Footprint::default().cover(budgets().requests.bound() / 2).unwrap();
}

proptest! {
    #[test]
    fn no_bytes_cause_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), frame in 1..50_usize) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for encoding in ["gzip", "deflate", "zstd"] {
            let _ = runtime.block_on(read(encoding, &bytes, frame));
        }
    }
}
