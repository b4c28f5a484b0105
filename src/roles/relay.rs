//! The relay role: what waits elsewhere goes on. It has no room to carry for yet and only keeps
//! its probes.

use std::sync::Arc;

use super::runtime::Platform;
use crate::platform::drain::Tasks;

pub(super) fn start(platform: &Arc<Platform>, tasks: &mut Tasks) {
    let stop = platform.stop.clone();
    tasks.spawn("relay", async move {
        stop.cancelled().await;
        Ok(())
    });
}
