//! Clients that violate the WebSocket protocol, or do not read.

use crate::{
    harness::{App, World, inbox::message, raw::Raw, socket::Socket, until, wait::seconds},
    messages::{send, stored},
    websocket::noted,
};

const MASK: [u8; 4] = [1, 2, 3, 4];

/// Builds a frame with this first byte, masked as clients must.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![first];
    match payload.len() {
        length @ 0..126 => frame.push(0x80 | u8::try_from(length).unwrap()),
        length => {
            frame.push(0x80 | 126);
            frame.extend(u16::try_from(length).unwrap().to_be_bytes());
        }
    }
    frame.extend(MASK);
    frame.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

/// Builds a complete handshake with these additional headers.
fn handshake(receiver: &str, headers: &str) -> String {
    format!(
        "GET /api/v1/websocket/message HTTP/1.1\r\nhost: x\r\nReceiverId: {receiver}\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
         sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
    )
}

/// Connects with a hand-written handshake.
async fn shaken(app: &App, receiver: &str) -> Raw {
    shake(Raw::connect(&app.api).await, receiver).await
}

async fn shake(mut raw: Raw, receiver: &str) -> Raw {
    raw.send(handshake(receiver, "")).await;
    let answer = raw.answer(seconds(5)).await.unwrap();
    assert_eq!(answer.status, 101, "{answer:?}");
    assert!(answer.head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "the example of RFC 6455: {}", answer.head);
    raw
}

/// Returns the code of the close frame among these frames.
fn close_code(received: &[u8]) -> Option<u16> {
    let mut rest = received;
    while let [first, length, tail @ ..] = rest {
        let length = usize::from(*length);
        if *first == 0x88 {
            return Some(u16::from_be_bytes([*tail.first()?, *tail.get(1)?]));
        }
        rest = tail.get(length..)?;
    }
    None
}

#[tokio::test]
async fn every_violation_of_the_protocol_has_its_close_code() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().env("POSTRIDER_MESSAGES__MAX_INCOMING_BYTES", "1000").start().await;
    // This client of the same receiver stays connected.
    let unhurt = Socket::plain(&app.api, "r").await;
    let unmasked = vec![0x81, 2, b'h', b'i'];
    let flood: Vec<u8> = (0..300).flat_map(|_| frame(0x89, b"ping")).collect();
    let fragments = [frame(0x01, &[b'x'; 600]), frame(0x80, &[b'x'; 600])].concat();
    for (what, bytes, code) in [
        ("unmasked", unmasked, 1002),
        ("the bit of compression", frame(0xC1, b"hi"), 1002),
        ("the second reserved bit", frame(0xA1, b"hi"), 1002),
        ("the third reserved bit", frame(0x91, b"hi"), 1002),
        ("a ping with a reserved bit", frame(0xC9, b"hi"), 1002),
        ("a reserved opcode", frame(0x83, b"hi"), 1002),
        ("the last reserved opcode", frame(0x87, b"hi"), 1002),
        ("a reserved control opcode", frame(0x8B, b"hi"), 1002),
        ("the last reserved control opcode", frame(0x8F, b"hi"), 1002),
        ("a fragmented ping", frame(0x09, b"hi"), 1002),
        ("a ping that is too long", frame(0x89, &[b'x'; 126]), 1002),
        ("a continuation of nothing", frame(0x80, b"hi"), 1002),
        ("text in the middle of text", [frame(0x01, b"a"), frame(0x81, b"b")].concat(), 1002),
        ("a close with half a code", frame(0x88, b"\x03"), 1002),
        ("a close with a code that is never sent", frame(0x88, b"\x03\xed"), 1002),
        ("a close with a code that is none", frame(0x88, b"\x00\x01"), 1002),
        ("a close with a reason that is not UTF-8", frame(0x88, b"\x03\xe8\xff"), 1007),
        ("text that is not UTF-8", frame(0x81, b"\xff\xfe"), 1007),
        ("text that ends within a character", frame(0x81, b"\xe2\x82"), 1007),
        ("fragments that are not UTF-8 together", [frame(0x01, b"\xe2\x82"), frame(0x80, b"x")].concat(), 1007),
        ("a frame that is too large", frame(0x81, &[b'x'; 1_001]), 1009),
        ("a frame that says it is endless", [&[0x81, 0xff][..], &[0x7f; 8], &MASK].concat(), 1009),
        ("a length with its highest bit", [&[0x81, 0xff][..], &[0xff; 8], &MASK].concat(), 1009),
        ("a message that is too large", fragments, 1009),
        ("fragments without an end", [frame(0x01, b"x"), frame(0x00, &[b'x'; 500]).repeat(9)].concat(), 1009),
        ("a flood of pings", flood, 1008),
    ] {
        let mut raw = shaken(&app, "r").await;
        raw.send(&bytes).await;
        let (received, _) = raw.rest(seconds(3)).await;
        assert_eq!(close_code(&received), Some(code), "{what}: {received:?}");
        assert!(!unhurt.seen().ended, "{what} hurt another connection");
    }
    send(&app, &message("r", "s", 1)).await;
    assert_eq!(unhurt.frames(1).await.json(), [message("r", "s", 1)]);
    unhurt.leave().await;
    // Unusual but valid frames are accepted: fragments, empty frames, a close without a code.
    let mut raw = shaken(&app, "odd").await;
    raw.send([frame(0x01, b"h"), frame(0x89, b"in between"), frame(0x80, b"i"), frame(0x82, b"")].concat()).await;
    raw.send(frame(0x88, b"")).await;
    let (received, _) = raw.rest(seconds(3)).await;
    assert!(received.starts_with(b"\x8a\x0ain between") && received.ends_with(b"\x88\x00"), "{received:?}");
    // Frames sent with the handshake, before its answer, are accepted as well.
    let mut raw = Raw::connect(&app.api).await;
    raw.send([handshake("odd", "").into_bytes(), frame(0x89, b"early"), frame(0x88, b"\x03\xe8")].concat()).await;
    assert_eq!(raw.answer(seconds(5)).await.unwrap().status, 101);
    let (received, ended) = raw.rest(seconds(3)).await;
    assert!(ended && received.ends_with(b"\x88\x02\x03\xe8"), "{received:?}");
    until("no connection is left", seconds(5), || async {
        (app.metric("postrider_messages_open_connections").await == Some(0.0)).then_some(())
    })
    .await;
    app.stop().await;
}

#[tokio::test]
async fn compression_is_not_negotiated_and_compressed_frames_are_not_inflated() {
    // A deflate block that repeats one byte, and would inflate to about a thousand times its size.
    let bomb = frame(0xC2, &[&[0xec, 0xc0, 0x01, 0x09][..], &[0; 15_000]].concat());
    let world = World::new().await.with_postgres().await;
    let app = world.app().role("api").start().await;
    let before_kib = app.rss_kib();
    for offer in ["permessage-deflate", "permessage-deflate; client_max_window_bits, x-webkit-deflate-frame"] {
        for _ in 0..50 {
            let mut raw = Raw::connect(&app.api).await;
            raw.send(handshake("r", &format!("sec-websocket-extensions: {offer}\r\n"))).await;
            let answer = raw.answer(seconds(5)).await.unwrap();
            assert!(answer.status == 101 && !answer.head.contains("extensions"), "{answer:?}");
            raw.send(&bomb).await;
            let (received, _) = raw.rest(seconds(3)).await;
            assert_eq!(close_code(&received), Some(1002), "{received:?}");
        }
    }
    let grown_kib = app.rss_kib().saturating_sub(before_kib);
    assert!(grown_kib < 20_000, "memory grew by {grown_kib} KiB, although nothing should be inflated");
    app.stop().await;
}

#[tokio::test]
async fn clients_that_stop_in_mid_frame_use_little_memory_and_are_dropped_when_they_half_close() {
    const COUNT: usize = 300;
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let unhurt = Socket::plain(&app.api, "r").await;
    let open = |count: usize| {
        let app = &app;
        until("the expected number of connections is open", seconds(20), move || async move {
            (app.metric("postrider_messages_open_connections").await == Some(count as f64)).then_some(())
        })
    };
    let (before_kib, mut halfway) = (app.rss_kib(), Vec::new());
    for number in 0..COUNT {
        let mut raw = shaken(&app, &format!("q{number}")).await;
        // Stop in the middle of a frame, of its length, of a message, and after the handshake.
        let whole = frame(0x01, &[b'x'; 16_000]);
        let part = [&whole[..12_000], &whole[..3], &whole, &[]][number % 4];
        raw.send(part).await;
        halfway.push(raw);
    }
    open(COUNT + 1).await;
    let each_kib = app.rss_kib().saturating_sub(before_kib) / COUNT as u64;
    assert!(each_kib < 60, "{each_kib} KiB for each stopped client");
    for raw in &mut halfway {
        raw.half_close().await;
    }
    open(1).await;
    for raw in &mut halfway {
        assert!(raw.rest(seconds(5)).await.1, "the connection was kept open");
    }
    send(&app, &message("r", "s", 1)).await;
    unhurt.frames(1).await;
    // The same before the handshake is answered.
    let mut raw = Raw::connect(&app.api).await;
    raw.send(&handshake("q", "")[..100]).await;
    raw.half_close().await;
    assert!(raw.closes(seconds(5)).await);
    app.stop().await;
}

#[tokio::test]
async fn invalid_handshakes_are_refused_and_unfinished_ones_are_cut_off() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().role("api").env("POSTRIDER_HTTP__HEADER_TIMEOUT_MS", "500").start().await;
    let head = "GET /api/v1/websocket/message?receiverId=r HTTP/1.1\r\nhost: x\r\n";
    let key = "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let upgrade = "connection: Upgrade\r\nupgrade: websocket\r\n";
    for rest in [
        upgrade.to_owned(),
        format!("{upgrade}{key}"),
        format!("{upgrade}{key}sec-websocket-version: 12\r\n"),
        format!("{upgrade}sec-websocket-version: 13\r\n"),
        format!("connection: Upgrade\r\n{key}sec-websocket-version: 13\r\n"),
        format!("upgrade: websocket\r\n{key}sec-websocket-version: 13\r\n"),
    ] {
        let mut raw = Raw::connect(&app.api).await;
        raw.send(format!("{head}{rest}\r\n")).await;
        let answer = raw.answer(seconds(5)).await.unwrap();
        assert_eq!(answer.status, 400, "{rest}: {answer:?}");
        assert!(answer.body.contains("invalid_request"), "{answer:?}");
    }
    let mut half = Raw::connect(&app.api).await;
    half.send(format!("{head}{upgrade}")).await;
    assert!(half.closes(seconds(5)).await);
    assert_eq!(app.metric("postrider_messages_open_connections").await.unwrap_or(0.0), 0.0);
    // A client that disconnects during its handshake leaves nothing behind.
    for _ in 0..20 {
        drop(shaken(&app, "r").await);
    }
    until("no connection is left", seconds(5), || async {
        (app.metric("postrider_messages_open_connections").await == Some(0.0)).then_some(())
    })
    .await;
    app.stop().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_is_disconnected_delays_nobody_and_gets_all_messages_on_reconnect() {
    const COUNT: usize = 400;
    let mut world = World::new().await.with_postgres().await;
    world.set("POSTRIDER_MESSAGES__WRITE_TIMEOUT_MS", "1000");
    let app = world.app().start().await;
    let stuck = shaken(&app, "r").await;
    let quick = Socket::cursors(&app.api, "r", "").await;
    let mut large = message("r", "s", 0);
    for number in 0..COUNT {
        large["content"] = format!("{number} {}", "x".repeat(60_000)).into();
        send(&app, &large).await;
    }
    quick.frames(COUNT).await;
    until("the stuck connection is closed", seconds(20), || async {
        (app.metric("postrider_messages_open_connections").await == Some(1.0)).then_some(())
    })
    .await;
    assert_eq!(app.metric("postrider_messages_slow_connections_total").await, Some(1.0));
    drop(stuck);
    let again = Socket::plain(&app.api, "r").await;
    let seen = again.frames(COUNT).await;
    assert!(seen.frames.iter().enumerate().all(|(at, frame)| frame.contains(&format!("\"content\":\"{at} x"))));
    app.stop().await;
}

#[tokio::test]
async fn many_clients_that_do_not_read_stay_within_their_memory_budget() {
    const CLIENTS: usize = 8;
    const COUNT: usize = 80;
    let mut world = World::new().await.with_postgres().await;
    world.set("POSTRIDER_MESSAGES__WRITE_TIMEOUT_MS", "600000");
    let (app, processor) = tokio::join!(world.app().role("api").start(), world.app().role("processor").start());
    let quick = Socket::plain(&app.api, "quick").await;
    let mut stuck = Vec::new();
    for number in 0..CLIENTS {
        stuck.push(shake(Raw::narrow(&app.api).await, &format!("r{number}")).await);
    }
    let before_kib = app.rss_kib();
    for number in 0..CLIENTS {
        let mut large = message(&format!("r{number}"), "s", 0);
        large["content"] = "x".repeat(60_000).into();
        world.kafka.write_in(&world.topic("message"), 0, &vec![large.to_string().into_bytes(); COUNT]).await;
    }
    until("all messages are stored", seconds(60), || async {
        let stored = processor.metric("postrider_messages_stored_total").await;
        (stored >= Some((CLIENTS * COUNT) as f64)).then_some(())
    })
    .await;
    send(&app, &message("quick", "s", 1)).await;
    quick.frames(1).await;
    let grown_kib = app.rss_kib().saturating_sub(before_kib);
    eprintln!("{grown_kib} KiB for {CLIENTS} clients that do not read their 5 MB");
    assert!(grown_kib < 20_000, "{grown_kib} KiB");
    drop(stuck);
    app.stop().await;
    processor.stop().await;
}

#[tokio::test]
async fn a_client_that_does_not_answer_pings_is_disconnected_and_one_that_does_is_kept() {
    let mut world = World::new().await.with_postgres().await;
    world.set("POSTRIDER_MESSAGES__PING_INTERVAL_MS", "200");
    world.set("POSTRIDER_MESSAGES__IDLE_TIMEOUT_MS", "1000");
    let app = world.app().role("api").start().await;
    let kept = Socket::plain(&app.api, "q").await;
    for part in [&b""[..], &frame(0x81, b"never finished")[..9]] {
        let mut silent = shaken(&app, "r").await;
        silent.send(part).await;
        let (received, ended) = silent.rest(seconds(4)).await;
        assert!(ended && close_code(&received) == Some(1008), "{received:?}");
    }
    until("the kept client got many pings", seconds(10), || async { (kept.seen().pings > 10).then_some(()) }).await;
    assert!(!kept.seen().ended);
    app.stop().await;
}

#[tokio::test]
async fn a_late_pong_counts_although_more_pings_were_sent_meanwhile() {
    let mut world = World::new().await.with_postgres().await;
    world.set("POSTRIDER_MESSAGES__PING_INTERVAL_MS", "100");
    let app = world.app().start().await;
    send(&app, &message("r", "s", 1)).await;
    stored(&app, "r", 1).await;
    let mut raw = shaken(&app, "r").await;
    let pings = |received: &[u8]| received.windows(2).filter(|two| two == b"\x89\x04").count();
    let received = raw.until(seconds(20), |received| pings(received) >= 5 && received.contains(&0x81)).await;
    // The first ping after the message.
    let message_at = received.iter().position(|byte| *byte == 0x81).unwrap();
    let ping_at = message_at + received[message_at..].windows(2).position(|two| two == b"\x89\x04").unwrap();
    raw.send(frame(0x8A, &received[ping_at + 2..ping_at + 6])).await;
    noted(&app, &world, "r").await;
    app.stop().await;
}
