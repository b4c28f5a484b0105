//! Export of traces to a collector over gRPC and HTTP.

use reqwest::Method;
use serde_json::json;

use crate::harness::{World, otlp::Collector, until, wait::seconds};

#[tokio::test]
async fn a_sampled_request_is_exported_as_a_span_of_the_callers_trace() {
    for (protocol, trace) in [("http", 0x11aa_22bb_33cc_44dd_55ee_66ff_7788_9900_u128), ("grpc", 0x99_8877)] {
        let collector = Collector::start().await;
        let world = World::new().await;
        let app = world
            .app()
            .role("api")
            .env("POSTRIDER_TELEMETRY__OTLP__ENDPOINT", &collector.url)
            .env("POSTRIDER_TELEMETRY__OTLP__PROTOCOL", protocol)
            .env("POSTRIDER_TELEMETRY__OTLP__SAMPLE_RATIO", "0")
            .start()
            .await;
        let unsampled = 0xdead_beef_u128;
        for (id, flags) in [(trace, "01"), (unsampled, "00")] {
            let sent = format!("00-{id:032x}-00f067aa0ba902b7-{flags}");
            let body = json!({"key": "k", "value": 1});
            let answer = app.post_with("/push", &[("traceparent", &sent)], &body).await.expect(202);
            let answered = answer.header("traceparent").to_owned();
            assert!(answered.starts_with(&format!("00-{id:032x}-")) && answered.ends_with(flags), "{answered}");
            assert_eq!(
                world.kafka.read(&world.topic("messages")).await.last().unwrap().header("traceparent"),
                Some(answered.as_str())
            );
        }
        let found = until("the span arrives", seconds(15), || async { collector.protocol_of(trace) }).await;
        assert_eq!(found, protocol);
        assert_eq!(collector.protocol_of(unsampled), None, "an unsampled trace was exported");
        app.stop().await;
    }
}

#[tokio::test]
async fn remaining_spans_are_sent_at_shutdown_and_an_unreachable_collector_delays_nothing() {
    let collector = Collector::start().await;
    let world = World::new().await;
    let start = |url: &str| {
        let app = world.app().role("api").env("POSTRIDER_TELEMETRY__OTLP__ENDPOINT", url);
        app.env("POSTRIDER_TELEMETRY__OTLP__SAMPLE_RATIO", "1").start()
    };
    let app = start(&collector.url).await;
    let answer = app.get("/health").await.expect(200);
    let trace = u128::from_str_radix(answer.header("traceparent").split('-').nth(1).unwrap(), 16).unwrap();
    app.stop().await;
    assert_eq!(collector.protocol_of(trace), Some("grpc"));
    let app = start("http://127.0.0.1:9").await;
    for _ in 0..50 {
        app.request(Method::GET, "/health", &[], "").await.expect(200);
    }
    app.stop().await;
}
