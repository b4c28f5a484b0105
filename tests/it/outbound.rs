//! Calling other people's endpoints, whatever they do.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use axum::http::{HeaderMap, StatusCode};
use bytes::Bytes;
use postrider::platform::outbound::{Client, Endpoint, Failure, Guard, Options};

use crate::harness::{
    target::{Act, Target},
    wait::{seconds, until_now},
};

fn options() -> Options {
    Options { guard: Guard::open(), timeout: seconds(2), max_idle: 8, max_retry_after: seconds(60), ca_file: None }
}

async fn post(options: &Options, url: &str) -> Result<StatusCode, Failure> {
    let client = Client::new(options).unwrap();
    call(&client, &Endpoint::new(url, HeaderMap::new()).unwrap()).await
}

async fn call(client: &Client, endpoint: &Endpoint) -> Result<StatusCode, Failure> {
    client.post(endpoint, endpoint.headers(0), Bytes::from_static(b"{}")).await
}

async fn failure(options: &Options, url: &str) -> Failure {
    post(options, url).await.expect_err("it must not succeed")
}

#[tokio::test]
async fn any_2xx_is_success_and_the_connection_is_used_again() {
    let target = Target::start().await;
    let (client, endpoint) = (Client::new(&options()).unwrap(), Endpoint::new(&target.url("/x?y=1"), HeaderMap::new()));
    let endpoint = endpoint.unwrap();
    for status in [200, 201, 202, 204, 299] {
        target.script([Act::status(status)]);
        assert_eq!(call(&client, &endpoint).await.unwrap().as_u16(), status);
    }
    assert_eq!(target.connections(), 1);
    let seen = target.seen();
    assert!(seen[0].head.starts_with("POST /x?y=1 HTTP/1.1\r\n"), "{}", seen[0].head);
    assert_eq!(seen[0].header("host").unwrap(), target.address.to_string());
    assert_eq!((seen[0].header("content-length"), seen[0].text()), (Some("2"), "{}"));
}

#[tokio::test]
async fn a_refusal_says_what_was_answered_and_when_to_come_back() {
    let target = Target::start().await;
    target.script([Act::Answer(503, "retry-after: 7\r\n", "try \n later")]);
    let refused = failure(&options(), &target.url("/")).await;
    assert_eq!((refused.class, refused.message.as_str()), ("http_503", "answered 503: try later"));
    assert_eq!(refused.retry_after, Some(seconds(7)));
    target.script([Act::Answer(429, "retry-after: 86400\r\n", "")]);
    let refused = failure(&options(), &target.url("/")).await;
    assert_eq!((refused.class, refused.retry_after), ("http_429", Some(seconds(60))), "capped");
    target.script([Act::status(410)]);
    let refused = failure(&options(), &target.url("/")).await;
    assert!(refused.gone && refused.class == "gone", "{refused:?}");
}

#[tokio::test]
async fn redirects_are_not_followed() {
    let (target, elsewhere) = (Target::start().await, Target::start().await);
    let location: &'static str = format!("location: {}\r\n", elsewhere.url("/secret")).leak();
    for status in [301, 302, 307, 308] {
        target.script([Act::Answer(status, location, "")]);
        let refused = failure(&options(), &target.url("/")).await;
        assert_eq!(refused.class, "redirect");
        assert!(refused.message.contains("/secret"), "{}", refused.message);
    }
    assert_eq!(elsewhere.count(), 0);
}

#[tokio::test]
async fn a_target_that_hangs_costs_the_timeout_and_no_more() {
    let target = Target::start().await;
    target.script([Act::Hang]);
    let options = Options { timeout: Duration::from_millis(300), ..options() };
    let began = Instant::now();
    let refused = tokio::time::timeout(seconds(30), failure(&options, &target.url("/"))).await;
    assert_eq!(refused.expect("it ends").class, "timeout");
    assert!(began.elapsed() >= options.timeout, "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_connection_that_nobody_accepts_costs_the_timeout() {
    // A listener whose queue is full answers no further attempt to connect.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let mut waiting = Vec::new();
    until_now("the queue is full", seconds(10), || {
        let stream = std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200));
        stream.map(|stream| waiting.push(stream)).is_err().then_some(())
    })
    .await;
    let options = Options { timeout: Duration::from_millis(300), ..options() };
    let refused = failure(&options, &format!("http://{address}/")).await;
    assert_eq!(refused.class, "timeout");
}

#[tokio::test]
async fn broken_connections_and_answers_are_told_apart() {
    let target = Target::start().await;
    for (act, class) in [
        (Act::Reset, "connection"),
        (Act::Bytes(b""), "connection"),
        (Act::Bytes(b"HTTP/1.1 200 OK\r\ncontent-"), "connection"),
        (Act::Bytes(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), "bad_answer"),
    ] {
        target.script([act.clone()]);
        let refused = failure(&options(), &target.url("/")).await;
        assert_eq!(refused.class, class, "{act:?}: {}", refused.message);
    }
    assert_eq!(target.count(), 4, "what may have been received is not sent again");
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert_eq!(failure(&options(), &format!("http://{free}/")).await.class, "connect");
    assert_eq!(failure(&options(), "http://nobody.invalid/").await.class, "dns");
}

#[tokio::test]
async fn slow_and_huge_bodies_cost_nothing_once_the_status_is_known() {
    let target = Target::start().await;
    for act in [Act::Trickle(200), Act::Flood(200, 200 << 20)] {
        target.script([act.clone()]);
        // Whoever waited for the body would have the timeout for an answer.
        let options = Options { timeout: seconds(60), ..options() };
        let answered = tokio::time::timeout(seconds(30), post(&options, &target.url("/"))).await;
        assert_eq!(answered.expect("it does not wait for the body").unwrap(), 200, "{act:?}");
    }
    target.script([Act::Flood(500, 200 << 20)]);
    let refused = failure(&options(), &target.url("/")).await;
    assert_eq!(refused.class, "http_500");
    assert!(refused.message.len() < 400, "{}", refused.message);
    // What the kernel's buffers take is out of our hands; it is far from 200 MB each.
    assert!(target.flooded() < 40 << 20, "{} bytes were read", target.flooded());
}

#[tokio::test]
async fn a_head_without_an_end_is_refused() {
    let target = Target::start().await;
    let head = format!("HTTP/1.1 200 OK\r\nx: {}", "y".repeat(1 << 20)).into_bytes();
    target.script([Act::Bytes(head.leak())]);
    let refused = failure(&options(), &target.url("/")).await;
    assert!(matches!(refused.class, "bad_answer" | "connection"), "{refused:?}");
}

#[tokio::test]
async fn an_idle_connection_that_the_target_closed_costs_no_attempt() {
    let target = Target::start().await;
    let (client, endpoint) = (Client::new(&options()).unwrap(), Endpoint::new(&target.url("/"), HeaderMap::new()));
    let endpoint = endpoint.unwrap();
    for round in 1..=20 {
        target.script([Act::Bytes(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")]);
        assert!(call(&client, &endpoint).await.is_ok(), "round {round}");
        // The close was sent before this; timers fire after what the sockets have to say.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(target.count(), 20);
}

#[tokio::test]
async fn private_addresses_are_refused_however_they_are_written() {
    let target = Target::start().await;
    let (strict, port) = (Options { guard: Guard::new(Vec::new()), ..options() }, target.address.port());
    for host in ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0x7f.1", "2130706433", "0.0.0.0", "[::1]"] {
        let refused = failure(&strict, &format!("http://{host}:{port}/")).await;
        assert_eq!(refused.class, "refused_address", "{host}: {}", refused.message);
    }
    assert_eq!(target.connections(), 0, "refused before anything is dialled");
    let allowed = Options { guard: Guard::new(vec!["127.0.0.0/8".parse().unwrap()]), ..options() };
    for host in ["127.0.0.1", "localhost"] {
        assert_eq!(post(&allowed, &format!("http://{host}:{port}/")).await.unwrap(), 200, "{host}");
    }
}

/// A certificate for 127.0.0.1 that signs itself, as PKCS #12 and PEM.
fn certificate(name: &str) -> (native_tls::Identity, std::path::PathBuf) {
    let folder = std::env::temp_dir().join(format!("postrider-outbound-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let openssl = |words: &str| {
        let output = Command::new("openssl").args(words.split(' ')).current_dir(&folder).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    openssl(
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out ca.pem",
    );
    let [ca, key] = ["ca.pem", "key.pem"].map(|file| std::fs::read(folder.join(file)).unwrap());
    (native_tls::Identity::from_pkcs8(&ca, &key).unwrap(), folder.join("ca.pem"))
}

#[tokio::test]
async fn an_unknown_authority_is_refused_and_a_known_one_accepted() {
    let (identity, ca_file) = certificate("known");
    let target = Target::with_tls(identity).await;
    let refused = failure(&options(), &target.url("/")).await;
    assert_eq!(refused.class, "tls", "{}", refused.message);
    let known = Options { ca_file: Some(ca_file), ..options() };
    assert_eq!(post(&known, &target.url("/")).await.unwrap(), 200);
    let elsewhere = format!("https://localhost:{}/", target.address.port());
    assert_eq!(failure(&known, &elsewhere).await.class, "tls", "the name is not in the certificate");
    assert_eq!(target.count(), 1);
}
