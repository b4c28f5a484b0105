//! Brokers that demand SASL over TLS, or a client certificate.

use serde_json::json;

use crate::harness::{Stack, World, app::Builder, until, wait::seconds};

/// A process on the listener that wants SCRAM over TLS.
fn scram(world: &World, stack: &Stack) -> Builder {
    let app = world.app().role("api").env("POSTRIDER_KAFKA__SECURITY_PROTOCOL", "sasl_ssl");
    app.env("POSTRIDER_KAFKA__BROKERS", stack.get("KAFKA_SASL_BROKERS"))
        .env("POSTRIDER_KAFKA__SASL__USERNAME", stack.get("KAFKA_SASL_USERNAME"))
        .env("POSTRIDER_KAFKA__SASL__PASSWORD", stack.get("KAFKA_SASL_PASSWORD"))
        .env("POSTRIDER_KAFKA__TLS__CA_FILE", stack.get("KAFKA_CA_FILE"))
}

/// A process on the listener that wants a client certificate.
fn mutual(world: &World, stack: &Stack) -> Builder {
    let app = world.app().role("api").env("POSTRIDER_KAFKA__SECURITY_PROTOCOL", "ssl");
    app.env("POSTRIDER_KAFKA__BROKERS", stack.get("KAFKA_MTLS_BROKERS"))
        .env("POSTRIDER_KAFKA__TLS__CA_FILE", stack.get("KAFKA_CA_FILE"))
        .env("POSTRIDER_KAFKA__TLS__CERTIFICATE_FILE", stack.get("KAFKA_CLIENT_CERT_FILE"))
        .env("POSTRIDER_KAFKA__TLS__KEY_FILE", stack.get("KAFKA_CLIENT_KEY_FILE"))
}

/// It never becomes ready, and readiness says why in one of these words.
async fn refused(app: Builder, words: &[&str]) {
    let app = app.even_if_not_ready().start().await;
    let what = format!("readiness says one of {words:?}");
    until(&what, seconds(15), || async {
        let detail = app.failing("kafka").await.expect("it must not be ready").to_lowercase();
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
