//! The Prometheus recorder: histogram buckets, and the upkeep that bounds its memory.

use std::time::Duration;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use postrider_time::clock;

use super::Error;

/// Buckets of durations in seconds, from a cached read to a slow webhook.
const DURATION_BUCKETS: [f64; 17] =
    [0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Buckets of records per batch and rows per commit.
const COUNT_BUCKETS: [f64; 8] = [1.0, 4.0, 16.0, 64.0, 256.0, 1_024.0, 4_096.0, 16_384.0];

/// Installs the recorder for the process. Run [`upkeep`] as well: without it, histograms grow while
/// nothing scrapes them.
pub fn install() -> Result<PrometheusHandle, Error> {
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &DURATION_BUCKETS)?
        .set_buckets_for_metric(Matcher::Suffix("_records".to_owned()), &COUNT_BUCKETS)?
        .set_buckets_for_metric(Matcher::Suffix("_rows".to_owned()), &COUNT_BUCKETS)?;
    Ok(builder.install_recorder()?)
}

/// Records the start time of the program. The start time that the operating system reports does not
/// change when a process replaces itself.
pub fn note_start() {
    metrics::gauge!("postrider_start_time_seconds").set(clock::now_ms() as f64 / 1e3);
}

/// Drains histograms and refreshes the process's own metrics every two seconds, until dropped.
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
