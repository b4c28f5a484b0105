//! The Prometheus recorder, with buckets and the upkeep that bounds its memory.

use std::time::Duration;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::platform::clock;

/// Seconds; from a cached read to a slow webhook.
const DURATION_BUCKETS: [f64; 17] =
    [0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Records per batch, or rows per commit.
const COUNT_BUCKETS: [f64; 8] = [1.0, 4.0, 16.0, 64.0, 256.0, 1_024.0, 4_096.0, 16_384.0];

/// Installs the recorder for the process. Without its upkeep, histograms nobody scrapes would grow.
pub fn install() -> Result<PrometheusHandle, String> {
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &DURATION_BUCKETS)
        .and_then(|builder| builder.set_buckets_for_metric(Matcher::Suffix("_records".to_owned()), &COUNT_BUCKETS))
        .and_then(|builder| builder.set_buckets_for_metric(Matcher::Suffix("_rows".to_owned()), &COUNT_BUCKETS))
        .map_err(|error| error.to_string())?;
    builder.install_recorder().map_err(|error| error.to_string())
}

/// Sets the time at which the program began. A process that replaces itself keeps the start time that the system counts.
pub fn note_start() {
    metrics::gauge!("postrider_start_time_seconds").set(clock::now_ms() as f64 / 1e3);
}

/// Drains histograms and refreshes the process's own metrics until dropped.
pub async fn upkeep(handle: PrometheusHandle) {
    let process = metrics_process::Collector::default();
    process.describe();
    let mut every = tokio::time::interval(Duration::from_secs(2));
    loop {
        every.tick().await;
        process.collect();
        handle.run_upkeep();
    }
}
