//! What comes at the same time, taken together.

use tokio::{sync::mpsc::Receiver, task::yield_now};

/// Waits for one, and takes up to `limit` of those that wait with it. False when no more will come.
pub async fn gather<T>(waiting: &mut Receiver<T>, together: &mut Vec<T>, limit: usize) -> bool {
    let Some(first) = waiting.recv().await else { return false };
    together.push(first);
    // Requests that are being read right now come along.
    yield_now().await;
    while together.len() < limit
        && let Ok(next) = waiting.try_recv()
    {
        together.push(next);
    }
    true
}
