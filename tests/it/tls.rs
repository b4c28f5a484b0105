//! Brokers that require SASL over TLS, or a client certificate.

use std::{os::unix::process::ExitStatusExt, time::Duration};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::{
    harness::{
        Stack, World,
        app::Builder,
        until,
        variables::{self, seed},
        wait::{seconds, until_now},
    },
    rotation::{Secret, await_refused, await_replaced, started, watching},
};

/// Configures a process for the listener that requires SCRAM over TLS.
fn scram(world: &World, stack: &Stack) -> Builder {
    let app = world.app().role("api").env("POSTRIDER_KAFKA__SECURITY_PROTOCOL", "sasl_ssl");
    app.env("POSTRIDER_KAFKA__BROKERS", stack.get("KAFKA_SASL_BROKERS"))
        .env("POSTRIDER_KAFKA__SASL__USERNAME", stack.get("KAFKA_SASL_USERNAME"))
        .env("POSTRIDER_KAFKA__SASL__PASSWORD", stack.get("KAFKA_SASL_PASSWORD"))
        .env("POSTRIDER_KAFKA__TLS__CA_FILE", stack.get("KAFKA_CA_FILE"))
}

/// Configures a process for the listener that requires a client certificate.
fn mutual(world: &World, stack: &Stack) -> Builder {
    let app = world.app().role("api").env("POSTRIDER_KAFKA__SECURITY_PROTOCOL", "ssl");
    app.env("POSTRIDER_KAFKA__BROKERS", stack.get("KAFKA_MTLS_BROKERS"))
        .env("POSTRIDER_KAFKA__TLS__CA_FILE", stack.get("KAFKA_CA_FILE"))
        .env("POSTRIDER_KAFKA__TLS__CERTIFICATE_FILE", stack.get("KAFKA_CLIENT_CERT_FILE"))
        .env("POSTRIDER_KAFKA__TLS__KEY_FILE", stack.get("KAFKA_CLIENT_KEY_FILE"))
}

/// Starts a process that must not become ready, and waits until readiness contains one of these
/// words.
async fn refused(app: Builder, words: &[&str]) {
    let app = app.even_if_not_ready().start().await;
    let what = format!("readiness contains one of {words:?}");
    until(&what, seconds(15), || async {
        let detail = app.failing("kafka").await.expect("the process is ready").to_lowercase();
        words.iter().any(|word| detail.contains(word)).then_some(())
    })
    .await;
    assert!(!app.is_ready().await);
    app.post_json("/push", &json!({"key": "k", "value": 1})).await.problem(503, "kafka_unavailable");
    app.stop().await;
}

#[tokio::test]
async fn scram_and_mutual_tls_work_and_wrong_credentials_are_named_in_readiness() {
    let stack = Stack::own("secure", &["--secure", "--only", "kafka"]).await;
    let world = World::on(&stack).await;
    let topic = world.make_topic("orders", 1).await;
    for app in [scram(&world, &stack), mutual(&world, &stack)] {
        let app = app.start().await;
        app.post_json("/produce", &json!({"topic": topic, "payload": 1})).await.expect(200);
        app.post_json("/push", &json!({"key": "k", "value": 1})).await.expect(202);
        app.stop().await;
    }
    assert_eq!(world.kafka.read(&topic).await.len(), 2);
    let from_file = std::env::temp_dir().join(format!("{}password", world.prefix));
    std::fs::write(&from_file, format!("{}\n", stack.get("KAFKA_SASL_PASSWORD"))).unwrap();
    let by_file = scram(&world, &stack)
        .unset("POSTRIDER_KAFKA__SASL__PASSWORD")
        .env("POSTRIDER_KAFKA__SASL__PASSWORD_FILE", from_file.to_str().unwrap());
    by_file.start().await.stop().await;
    refused(scram(&world, &stack).env("POSTRIDER_KAFKA__SASL__PASSWORD", "wrong"), &["authentication"]).await;
    let own_ca = stack.get("KAFKA_CLIENT_CERT_FILE");
    refused(scram(&world, &stack).env("POSTRIDER_KAFKA__TLS__CA_FILE", own_ca), &["ssl", "certificate"]).await;
    let without =
        mutual(&world, &stack).unset("POSTRIDER_KAFKA__TLS__CERTIFICATE_FILE").unset("POSTRIDER_KAFKA__TLS__KEY_FILE");
    refused(without, &["ssl", "certificate"]).await;
}

#[tokio::test]
async fn a_rotated_password_or_authority_that_brokers_reject_changes_nothing_until_it_is_fixed() {
    let stack = Stack::own("rotated", &["--secure", "--only", "kafka"]).await;
    let world = World::on(&stack).await;
    let (good, authority) =
        (stack.get("KAFKA_SASL_PASSWORD"), std::fs::read_to_string(stack.get("KAFKA_CA_FILE")).unwrap());
    let (password, ca) = (Secret::new(&world, "password", good), Secret::new(&world, "ca.crt", &authority));
    let app = scram(&world, &stack).unset("POSTRIDER_KAFKA__SASL__PASSWORD");
    let app = app.env("POSTRIDER_KAFKA__SASL__PASSWORD_FILE", password.path());
    let app = watching(app.env("POSTRIDER_KAFKA__TLS__CA_FILE", ca.path()), &[password.path(), ca.path()]);
    let mut app = app.start().await;
    let before = started(&app).await;
    let another = std::fs::read_to_string(stack.get("KAFKA_CLIENT_CERT_FILE")).unwrap();
    for (secret, wrong, right) in [(&password, "hunter22", good), (&ca, &another, &authority)] {
        secret.set(wrong);
        await_refused(&app, "kafka", true).await;
        app.post_json("/push", &json!({"key": "k", "value": 1})).await.expect(202);
        assert!(app.is_ready().await);
        secret.set(right);
        await_refused(&app, "kafka", false).await;
    }
    assert_eq!(started(&app).await, before);
    assert!(!app.log().contains("hunter22"), "{}", app.log());
    password.set(&format!("{good}\n"));
    await_replaced(&mut app, before).await;
    app.post_json("/push", &json!({"key": "k", "value": 2})).await.expect(202);
    app.stop().await;
}

/// Ends processes at random moments of their first connections. OpenSSL must not clean up while
/// threads still use it: that would be a segmentation fault.
#[tokio::test]
async fn a_process_that_ends_while_it_connects_ends_without_a_crash() {
    let stack = Stack::own("exits", &["--secure", "--only", "kafka"]).await;
    let world = World::on(&stack).await;
    let (starts, seed) = (if variables::long() { 200 } else { 40 }, seed("EXIT_SEED"));
    let mut random = fastrand::Rng::with_seed(seed);
    for number in 0..starts {
        let app = if number % 4 == 3 { mutual(&world, &stack) } else { scram(&world, &stack) };
        // An address that cannot be bound ends the process by itself.
        let fails = number % 5 == 4;
        let app = if fails {
            app.env("POSTRIDER_HTTP__LISTEN", "192.0.2.1:1").env("POSTRIDER_AUTH__MODE", "off")
        } else {
            app
        };
        let mut process = app.spawn();
        let pid = Pid::from_raw(i32::try_from(process.id()).unwrap()).unwrap();
        if !fails {
            tokio::time::sleep(Duration::from_millis(random.u64(20..260))).await;
            kill_process(pid, Signal::TERM).unwrap();
            tokio::time::sleep(Duration::from_millis(random.u64(0..50))).await;
            // The second signal ends the process at once. It may have ended before.
            let _ = kill_process(pid, Signal::TERM);
        }
        let what = format!("process {number} ends (EXIT_SEED={seed})");
        let status = until_now(&what, seconds(30), || process.try_wait().unwrap()).await;
        let is_fine = match status.code() {
            Some(code) => {
                if fails {
                    code == 1
                } else {
                    code == 0 || code == 143
                }
            }
            // The signal came before the process had a handler.
            None => status.signal() == Some(Signal::TERM.as_raw()) && !fails,
        };
        assert!(is_fine, "process {number} ended with {status} (EXIT_SEED={seed}, starts that fail: {fails})");
    }
}
