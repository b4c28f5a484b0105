//! Clients that break the rules of WebSockets, or read nothing.

use crate::{
    harness::{App, World, inbox::message, raw::Raw, socket::Socket, until, wait::seconds},
    messages::send,
};

const MASK: [u8; 4] = [1, 2, 3, 4];

/// A frame with this first byte, masked as clients must.
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

/// Connects with a handshake by hand.
async fn shaken(app: &App, receiver: &str) -> Raw {
    let mut raw = Raw::connect(&app.api).await;
    raw.send(format!(
        "GET /api/v1/websocket/message HTTP/1.1\r\nhost: x\r\nReceiverId: {receiver}\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
         sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    ))
    .await;
    let answer = raw.answer(seconds(5)).await.unwrap();
    assert_eq!(answer.status, 101, "{answer:?}");
    assert!(answer.head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "the example of RFC 6455: {}", answer.head);
    raw
}

/// The code of the close that is the last of these frames.
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
async fn every_breach_of_the_protocol_has_its_close_code() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().role("api").env("POSTRIDER_MESSAGES__MAX_INCOMING_BYTES", "1000").start().await;
    let unmasked = vec![0x81, 2, b'h', b'i'];
    let flood: Vec<u8> = (0..300).flat_map(|_| frame(0x89, b"ping")).collect();
    let fragments = [frame(0x01, &[b'x'; 600]), frame(0x80, &[b'x'; 600])].concat();
    for (what, bytes, code) in [
        ("unmasked", unmasked, 1002),
        ("a reserved bit", frame(0xC1, b"hi"), 1002),
        ("a reserved opcode", frame(0x83, b"hi"), 1002),
        ("a reserved control opcode", frame(0x8B, b"hi"), 1002),
        ("a fragmented ping", frame(0x09, b"hi"), 1002),
        ("a ping that is too long", frame(0x89, &[b'x'; 126]), 1002),
        ("a continuation of nothing", frame(0x80, b"hi"), 1002),
        ("text in the middle of text", [frame(0x01, b"a"), frame(0x81, b"b")].concat(), 1002),
        ("text that is not UTF-8", frame(0x81, b"\xff\xfe"), 1007),
        ("a frame that is too large", frame(0x81, &[b'x'; 1_001]), 1009),
        ("a message that is too large", fragments, 1009),
        ("a flood of pings", flood, 1008),
    ] {
        let mut raw = shaken(&app, "r").await;
        raw.send(&bytes).await;
        let (received, _) = raw.rest(seconds(3)).await;
        assert_eq!(close_code(&received), Some(code), "{what}: {received:?}");
    }
    // What is merely odd is taken: fragments, empty frames, a close without a code.
    let mut raw = shaken(&app, "r").await;
    raw.send([frame(0x01, b"h"), frame(0x89, b"in between"), frame(0x80, b"i"), frame(0x82, b"")].concat()).await;
    raw.send(frame(0x88, b"")).await;
    let (received, _) = raw.rest(seconds(3)).await;
    assert!(received.starts_with(b"\x8a\x0ain between") && received.ends_with(b"\x88\x00"), "{received:?}");
    until("nobody is left", seconds(5), || async {
        (app.metric("postrider_messages_open_connections").await == Some(0.0)).then_some(())
    })
    .await;
    app.stop().await;
}

#[tokio::test]
async fn handshakes_that_are_none_are_refused_and_unfinished_ones_cut_off() {
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
    // One that goes away in the moment of its handshake leaves nothing behind.
    for _ in 0..20 {
        drop(shaken(&app, "r").await);
    }
    until("nobody is left", seconds(5), || async {
        (app.metric("postrider_messages_open_connections").await == Some(0.0)).then_some(())
    })
    .await;
    app.stop().await;
}

#[tokio::test]
async fn who_reads_nothing_is_closed_and_has_it_all_at_the_next_connect_and_holds_up_nobody() {
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
    until("it is given up", seconds(20), || async {
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
async fn who_never_answers_pings_is_closed_and_who_does_is_kept() {
    let mut world = World::new().await.with_postgres().await;
    world.set("POSTRIDER_MESSAGES__PING_INTERVAL_MS", "200");
    world.set("POSTRIDER_MESSAGES__IDLE_TIMEOUT_MS", "1000");
    let app = world.app().role("api").start().await;
    let kept = Socket::plain(&app.api, "q").await;
    let mut silent = shaken(&app, "r").await;
    let (received, ended) = silent.rest(seconds(4)).await;
    assert!(ended && close_code(&received) == Some(1008), "{received:?}");
    until("many pings", seconds(10), || async { (kept.seen().pings > 10).then_some(()) }).await;
    assert!(!kept.seen().ended);
    app.stop().await;
}
