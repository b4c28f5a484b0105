//! Takes items that arrive at the same time together.

use tokio::{sync::mpsc::Receiver, task::yield_now};

/// Waits for an item, and takes up to `limit` items that wait together with it. Returns `false`
/// when no more will come.
pub async fn gather<T>(waiting: &mut Receiver<T>, together: &mut Vec<T>, limit: usize) -> bool {
    let Some(first) = waiting.recv().await else { return false };
    together.push(first);
    // Let requests that are being read right now join.
    yield_now().await;
    while together.len() < limit
        && let Ok(next) = waiting.try_recv()
    {
        together.push(next);
    }
    true
}
