//! TLS on the API listener.

use std::{io::Read, net::TcpStream, path::Path, process::Command};

use openssl::{
    asn1::Asn1Time,
    bn::BigNum,
    hash::MessageDigest,
    pkey::PKey,
    rsa::Rsa,
    x509::{X509Builder, X509NameBuilder, extension::SubjectAlternativeName},
};
use serde_json::json;
use tokio_tungstenite::{client_async, tungstenite::Message};

use crate::harness::{App, World, app::log_folder, stack::off_runtime, until, wait::seconds};

/// Writes a new key and a certificate for `localhost` that it signed itself.
fn issue(folder: &Path) {
    let key = PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap();
    let mut name = X509NameBuilder::new().unwrap();
    name.append_entry_by_text("CN", "localhost").unwrap();
    let name = name.build();
    let mut builder = X509Builder::new().unwrap();
    builder.set_version(2).unwrap();
    let serial = BigNum::from_u32(fastrand::u32(1..)).unwrap().to_asn1_integer().unwrap();
    builder.set_serial_number(&serial).unwrap();
    builder.set_subject_name(&name).unwrap();
    builder.set_issuer_name(&name).unwrap();
    builder.set_pubkey(&key).unwrap();
    builder.set_not_before(&Asn1Time::days_from_now(0).unwrap()).unwrap();
    builder.set_not_after(&Asn1Time::days_from_now(1).unwrap()).unwrap();
    let names = SubjectAlternativeName::new().dns("localhost").build(&builder.x509v3_context(None, None)).unwrap();
    builder.append_extension(names).unwrap();
    builder.sign(&key, MessageDigest::sha256()).unwrap();
    // The key first: while the pair does not fit, the one before stays in use.
    std::fs::write(folder.join("tls.key"), key.private_key_to_pem_pkcs8().unwrap()).unwrap();
    std::fs::write(folder.join("tls.crt"), builder.build().to_pem().unwrap()).unwrap();
}

/// Returns the status and the version of HTTP of an answer to curl; `None` if there was none.
async fn curl(app: &App, folder: &Path, words: &[&str]) -> Option<String> {
    let url = app.api.replace("http://127.0.0.1", "https://localhost") + "/health";
    let mut command = Command::new("curl");
    command.args(["-sS", "-o", "/dev/null", "-w", "%{http_code} %{http_version}", "--max-time", "10", "--cacert"]);
    command.arg(folder.join("tls.crt")).args(words).arg(url);
    let output = off_runtime(move || command.output().unwrap()).await;
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
}

#[tokio::test]
async fn the_api_speaks_tls_and_uses_a_changed_certificate_for_new_connections() {
    let mut world = World::new().await.with_postgres().await;
    let folder = log_folder().join(format!("{}tls", world.prefix));
    std::fs::create_dir_all(&folder).unwrap();
    issue(&folder);
    for (name, file) in [("CERTIFICATE_FILE", "tls.crt"), ("KEY_FILE", "tls.key")] {
        world.set(&format!("POSTRIDER_HTTP__TLS__{name}"), folder.join(file).to_str().unwrap());
    }
    world.set("POSTRIDER_HTTP__HEADER_TIMEOUT_MS", "1000");
    let app = world.app().start().await;
    assert_eq!(curl(&app, &folder, &["--http2"]).await.as_deref(), Some("200 2"));
    assert_eq!(curl(&app, &folder, &["--http1.1"]).await.as_deref(), Some("200 1.1"));
    assert_eq!(curl(&app, &folder, &["--tls-max", "1.1"]).await, None, "TLS 1.1 is too old");

    // A WebSocket stays open while the certificate changes.
    let authority = native_tls::Certificate::from_pem(&std::fs::read(folder.join("tls.crt")).unwrap()).unwrap();
    let connector = native_tls::TlsConnector::builder().add_root_certificate(authority).build().unwrap();
    let address = app.api.trim_start_matches("http://").to_owned();
    let tcp = tokio::net::TcpStream::connect(&address).await.unwrap();
    let stream = tokio_native_tls::TlsConnector::from(connector).connect("localhost", tcp).await.unwrap();
    let url = format!("wss://localhost:{}/api/v1/websocket/message?receiverId=r", address.rsplit_once(':').unwrap().1);
    let (mut socket, _) = client_async(url, stream).await.unwrap();

    let before = std::fs::read(folder.join("tls.crt")).unwrap();
    issue(&folder);
    assert_ne!(std::fs::read(folder.join("tls.crt")).unwrap(), before);
    until("the new certificate is served", seconds(20), || async { curl(&app, &folder, &[]).await }).await;
    let message = json!({"chatId": "c", "senderId": "s", "receiverId": "r", "content": "hello"}).to_string();
    let data = ["-X", "POST", "-H", "content-type: application/json", "-d", &message];
    let push = app.api.replace("http://127.0.0.1", "https://localhost") + "/api/v1/message/action";
    let mut command = Command::new("curl");
    command.args(["-sS", "--max-time", "10", "--cacert"]).arg(folder.join("tls.crt")).args(data).arg(push);
    assert_eq!(off_runtime(move || command.output().unwrap()).await.stdout, b"Message Sent");
    let frame = loop {
        match futures_util::StreamExt::next(&mut socket).await.unwrap().unwrap() {
            Message::Text(text) => break text,
            _ => continue,
        }
    };
    assert!(frame.contains("hello"), "{frame}");

    // Files that cannot be used change nothing.
    let good = std::fs::read(folder.join("tls.key")).unwrap();
    std::fs::write(folder.join("tls.key"), b"nonsense").unwrap();
    until("the metric tells", seconds(20), || async {
        (app.metric("http_server_tls_certificate_refused").await == Some(1.0)).then_some(())
    })
    .await;
    assert!(curl(&app, &folder, &[]).await.is_some(), "the certificate before is no longer served");
    std::fs::write(folder.join("tls.key"), good).unwrap();
    until("the metric tells", seconds(20), || async {
        (app.metric("http_server_tls_certificate_refused").await == Some(0.0)).then_some(())
    })
    .await;

    // Clients that do not speak TLS, or do not go on, lose their connection and disturb nobody.
    assert!(app.client.get(format!("{}/health", app.api)).send().await.is_err());
    let silent = off_runtime(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(seconds(20))).unwrap();
        stream.read(&mut [0; 1]).unwrap()
    });
    assert_eq!(silent.await, 0, "a connection without a handshake stays open");
    assert!(curl(&app, &folder, &[]).await.is_some());
    app.stop().await;
    std::fs::remove_dir_all(&folder).unwrap();
}

#[tokio::test]
async fn files_that_cannot_be_used_are_refused_at_the_start() {
    let mut world = World::new().await;
    let folder = log_folder().join(format!("{}tls", world.prefix));
    std::fs::create_dir_all(&folder).unwrap();
    issue(&folder);
    let (certificate, key) = (folder.join("tls.crt"), folder.join("tls.key"));
    let other = folder.join("other");
    std::fs::create_dir_all(&other).unwrap();
    issue(&other);
    for (certificate, key, error) in [
        (certificate.clone(), "".into(), "`http.tls.certificate_file` and `http.tls.key_file` must both be set"),
        (certificate.clone(), folder.join("absent"), "absent: No such file or directory"),
        (certificate.clone(), other.join("tls.key"), "key values mismatch"),
        (key.clone(), key.clone(), "no start line"),
    ] {
        world.set("POSTRIDER_HTTP__TLS__CERTIFICATE_FILE", certificate.to_str().unwrap());
        world.set("POSTRIDER_HTTP__TLS__KEY_FILE", key.to_str().unwrap());
        for words in [&["config", "check"][..], &["run", "--role", "api"]] {
            let output = world.command().args(words).output().unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success() && stderr.contains(error), "{error}: {stderr}");
        }
    }
    std::fs::remove_dir_all(&folder).unwrap();
}
