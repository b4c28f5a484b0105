use std::io::Write;

use flate2::{
    Compression,
    write::{DeflateEncoder, GzEncoder, ZlibEncoder},
};
use futures_util::stream;
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
    let collected = plain(request)?.collect().await.map_err(broken)?;
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
        let mut body = plain(request).unwrap();
        let mut bytes = 0;
        while let Some(frame) = body.frame().await {
            let piece = frame.unwrap().into_data().unwrap();
            assert!(piece.len() <= PIECE, "{encoding}");
            bytes += piece.len();
        }
        assert_eq!(bytes, bomb.len());
    }
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
