//! The client for outbound HTTP calls, against targets that misbehave.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use axum::http::{HeaderMap, StatusCode};
use bytes::Bytes;
use postrider_outbound::{Client, Endpoint, Failure, Guard, Options};

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
    post(options, url).await.expect_err("the call succeeded")
}

#[tokio::test]
async fn any_2xx_is_success_and_the_connection_is_reused() {
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
async fn a_failure_has_the_targets_answer_and_its_retry_after() {
    let target = Target::start().await;
    target.script([Act::Answer(503, "retry-after: 7\r\n", "try \n later")]);
    let refused = failure(&options(), &target.url("/")).await;
    assert_eq!((refused.class, refused.message.as_str()), ("http_503", "answered 503: try later"));
    assert_eq!(refused.retry_after, Some(seconds(7)));
    target.script([Act::Answer(429, "retry-after: 86400\r\n", "")]);
    let refused = failure(&options(), &target.url("/")).await;
    assert_eq!((refused.class, refused.retry_after), ("http_429", Some(seconds(60))), "the wait is not capped");
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
        let host = elsewhere.url("");
        assert!(refused.message.contains(&format!("`{host}/********`")), "{}", refused.message);
    }
    assert_eq!(elsewhere.count(), 0);
}

#[tokio::test]
async fn a_call_to_a_hung_target_fails_after_the_timeout() {
    let target = Target::start().await;
    target.script([Act::Hang]);
    let options = Options { timeout: Duration::from_millis(300), ..options() };
    let began = Instant::now();
    let refused = tokio::time::timeout(seconds(30), failure(&options, &target.url("/"))).await;
    assert_eq!(refused.expect("the call never ended").class, "timeout");
    assert!(began.elapsed() >= options.timeout, "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_connection_that_is_never_accepted_fails_after_the_timeout() {
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
async fn broken_connections_and_broken_answers_have_different_classes() {
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
    assert_eq!(target.count(), 4, "a request that the target may have received was sent again");
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert_eq!(failure(&options(), &format!("http://{free}/")).await.class, "connect");
    assert_eq!(failure(&options(), "http://nobody.invalid/").await.class, "dns");
}

#[tokio::test]
async fn slow_and_huge_bodies_are_not_read_once_the_status_is_known() {
    let target = Target::start().await;
    for act in [Act::Trickle(200), Act::Flood(200, 200 << 20)] {
        target.script([act.clone()]);
        // A client that waited for the body would time out.
        let options = Options { timeout: seconds(60), ..options() };
        let answered = tokio::time::timeout(seconds(30), post(&options, &target.url("/"))).await;
        assert_eq!(answered.expect("the call waited for the body").unwrap(), 200, "{act:?}");
    }
    target.script([Act::Flood(500, 200 << 20)]);
    let refused = failure(&options(), &target.url("/")).await;
    assert_eq!(refused.class, "http_500");
    assert!(refused.message.len() < 400, "{}", refused.message);
    // The kernel's buffers accept some bytes, but far less than 200 MB each.
    assert!(target.flooded() < 40 << 20, "{} bytes were read", target.flooded());
}

#[tokio::test]
async fn an_endless_head_is_refused() {
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
        // The target has closed already; the runtime handles socket events before timers.
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
    assert_eq!(target.connections(), 0, "a refused address was dialled");
    let allowed = Options { guard: Guard::new(vec!["127.0.0.0/8".parse().unwrap()]), ..options() };
    for host in ["127.0.0.1", "localhost"] {
        assert_eq!(post(&allowed, &format!("http://{host}:{port}/")).await.unwrap(), 200, "{host}");
    }
}

/// Creates a self-signed certificate for 127.0.0.1: its identity, and the path of its PEM file.
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
    assert_eq!(failure(&known, &elsewhere).await.class, "tls", "a name that is not in the certificate was accepted");
    assert_eq!(target.count(), 1);
}
