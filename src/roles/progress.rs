//! Reports the progress of the command `relay`: a line that is refreshed on a terminal, otherwise a
//! log message every ten seconds.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use postrider_gateway::relay::{Route, Snapshot};
use postrider_kafka::consumer::Lag;
use postrider_telemetry::StatusLine;

/// Interval between refreshes of the line on a terminal.
const REFRESH: Duration = Duration::from_secs(1);
/// Interval between log messages.
const LOG: Duration = Duration::from_secs(10);

/// Reports progress until dropped.
pub(super) async fn show(route: Arc<Route>, lag: Lag) {
    let line = StatusLine::on_terminal();
    let pause = if line.is_some() { REFRESH } else { LOG };
    let mut every = tokio::time::interval(pause);
    every.tick().await;
    let (mut before, mut at) = (Snapshot::default(), Instant::now());
    loop {
        every.tick().await;
        let (now, elapsed) = (route.snapshot(), at.elapsed());
        let rate = (now.delivered - before.delivered) as f64 / elapsed.as_secs_f64();
        let lag = lag.records();
        match &line {
            Some(line) => line.set(&text(&now, rate, lag)),
            None => tracing::info!(
                rate = (rate * 10.0).round() / 10.0,
                lag.records = lag,
                in_flight = now.in_flight,
                delivered = now.delivered,
                failed = now.failed,
                dead_letters = now.dead_letters,
                "progress"
            ),
        }
        (before, at) = (now, Instant::now());
    }
}

fn text(now: &Snapshot, rate: f64, lag: Option<u64>) -> String {
    let lag = lag.map_or_else(|| "?".to_owned(), |lag| lag.to_string());
    let Snapshot { delivered, failed, dead_letters, in_flight } = now;
    format!(
        "{rate:.1}/s  lag {lag}  in flight {in_flight}  delivered {delivered}  failed attempts {failed}  dead letters {dead_letters}"
    )
}
