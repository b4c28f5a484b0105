//! Reports the progress of the command `relay`: a line that is refreshed on a terminal, otherwise a
//! log message every ten seconds.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use metrics_exporter_prometheus::PrometheusHandle;

use crate::{
    gateway::relay::{Route, Snapshot},
    platform::telemetry::StatusLine,
};

/// Interval between refreshes of the line on a terminal.
const REFRESH: Duration = Duration::from_secs(1);
/// Interval between log messages.
const LOG: Duration = Duration::from_secs(10);

/// Reports progress until dropped. `consumer` is the label of the consumer's lag metric.
pub(super) async fn show(route: Arc<Route>, metrics: PrometheusHandle, consumer: &'static str) {
    let line = StatusLine::on_terminal();
    let pause = if line.is_some() { REFRESH } else { LOG };
    let mut every = tokio::time::interval(pause);
    every.tick().await;
    let (mut before, mut at) = (Snapshot::default(), Instant::now());
    loop {
        every.tick().await;
        let (now, elapsed) = (route.snapshot(), at.elapsed());
        let rate = (now.delivered - before.delivered) as f64 / elapsed.as_secs_f64();
        let lag = lag(&metrics.render(), consumer);
        match &line {
            Some(line) => line.set(&text(&now, rate, lag)),
            None => tracing::info!(
                rate = (rate * 10.0).round() / 10.0,
                lag.records = lag,
                in_flight = now.in_flight,
                delivered = now.delivered,
                failed = now.failed,
                dead_letters = now.given_up,
                "progress"
            ),
        }
        (before, at) = (now, Instant::now());
    }
}

fn text(now: &Snapshot, rate: f64, lag: Option<u64>) -> String {
    let lag = lag.map_or_else(|| "?".to_owned(), |lag| lag.to_string());
    let Snapshot { delivered, failed, given_up, in_flight } = now;
    format!(
        "{rate:.1}/s  lag {lag}  in flight {in_flight}  delivered {delivered}  failed attempts {failed}  dead letters {given_up}"
    )
}

/// Reads the consumer's lag from the metrics, which the Kafka client updates every few seconds.
/// Returns `None` until it has.
fn lag(metrics: &str, consumer: &str) -> Option<u64> {
    let label = format!("client=\"{consumer}\"");
    let lines = metrics.lines().filter(|line| line.starts_with("postrider_consumer_lag_records{"));
    let found = lines.filter(|line| line.contains(&label)).filter_map(|line| line.rsplit(' ').next()?.parse().ok());
    found.map(|lag: f64| lag as u64).reduce(|a, b| a + b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lag_is_read_for_the_named_consumer() {
        let metrics = "# TYPE postrider_consumer_lag_records gauge\n\
            postrider_consumer_lag_records{client=\"relay-t\",topic=\"t\"} 17\n\
            postrider_consumer_lag_records{client=\"kv\",topic=\"messages\"} 4\n";
        assert_eq!(lag(metrics, "relay-t"), Some(17));
        assert_eq!(lag(metrics, "relay-x"), None);
    }
}
