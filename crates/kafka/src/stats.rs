//! Exports the client library's statistics as metrics with bounded labels.

use metrics::{counter, gauge};
use rdkafka::Statistics;

/// Records one report. The client id distinguishes producers and consumers.
pub fn record(statistics: &Statistics) {
    let client = statistics.client_id.trim_start_matches("postrider-").to_owned();
    gauge!("postrider_kafka_client_queued_records", "client" => client.clone()).set(statistics.msg_cnt as f64);
    gauge!("postrider_kafka_client_queued_bytes", "client" => client.clone()).set(statistics.msg_size as f64);
    counter!("postrider_kafka_client_requests_total", "client" => client.clone())
        .absolute(u64::try_from(statistics.tx).unwrap_or(0));
    counter!("postrider_kafka_client_sent_bytes_total", "client" => client.clone())
        .absolute(u64::try_from(statistics.tx_bytes).unwrap_or(0));
    counter!("postrider_kafka_client_received_bytes_total", "client" => client.clone())
        .absolute(u64::try_from(statistics.rx_bytes).unwrap_or(0));
    if let Some(idempotence) = &statistics.eos {
        counter!("postrider_kafka_client_epochs_total", "client" => client.clone())
            .absolute(u64::try_from(idempotence.epoch_cnt).unwrap_or(0));
    }
    let up = statistics.brokers.values().filter(|broker| broker.nodeid >= 0 && broker.state == "UP").count();
    gauge!("postrider_kafka_client_connected_brokers", "client" => client.clone()).set(up as f64);
    let slowest = statistics.brokers.values().filter_map(|broker| broker.rtt.as_ref()).map(|rtt| rtt.p99).max();
    if let Some(micros) = slowest {
        gauge!("postrider_kafka_client_request_p99_seconds", "client" => client.clone()).set(micros as f64 / 1e6);
    }
    for topic in statistics.topics.values() {
        let lag: i64 = topic
            .partitions
            .values()
            .filter(|partition| partition.partition >= 0 && partition.consumer_lag_stored >= 0)
            .map(|partition| partition.consumer_lag_stored)
            .sum();
        if statistics.client_type == "consumer" {
            gauge!("postrider_consumer_lag_records", "client" => client.clone(), "topic" => topic.topic.clone())
                .set(lag as f64);
        }
    }
}
