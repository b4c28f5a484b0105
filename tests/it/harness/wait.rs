//! Waits for a condition, with a deadline.

use std::time::{Duration, Instant};

/// Polls until `probe` returns a value. Fails the test with `what` after `within`.
pub async fn until<T, F>(what: &str, within: Duration, mut probe: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    let begun = Instant::now();
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(begun.elapsed() < within, "not within {} s: {what}", within.as_secs_f32());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Like [`until`], for synchronous probes.
pub async fn until_now<T>(what: &str, within: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    until(what, within, || std::future::ready(probe())).await
}

pub const fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}
