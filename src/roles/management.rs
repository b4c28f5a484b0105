//! The management port of a process.

use std::{io::ErrorKind, time::Duration};

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::runtime::{Mission, Platform};
use crate::platform::{
    drain::{Draining, Ending, Tasks},
    http::{client::Proxies, serve, shortcut::ShortCuts},
    ops,
};

/// Ports after a taken management port that a command tries.
const PORTS_TRIED: u16 = 100;

/// A command takes the next free port where nobody has asked for a certain one, so that several can
/// run side by side.
pub(super) async fn bind(addresses: &[String], mission: &Mission) -> Result<Vec<TcpListener>, String> {
    let error = match serve::bind(addresses).await {
        Ok(listeners) => return Ok(listeners),
        Err(error) => error,
    };
    let any_port = matches!(mission, Mission::Relay(command) if command.any_management_port);
    if let (true, ErrorKind::AddrInUse, [address]) = (any_port, error.kind(), addresses)
        && let Some((host, port)) = address.rsplit_once(':')
        && let Ok(port) = port.parse::<u16>()
    {
        for next in port.saturating_add(1)..=port.saturating_add(PORTS_TRIED) {
            if let Ok(listeners) = serve::bind(&[format!("{host}:{next}")]).await {
                tracing::warn!(taken = port, port = next, "the management port is taken; using the next free one");
                return Ok(listeners);
            }
        }
    }
    Err(error.to_string())
}

/// The management port answers until the very end, so it has a stop of its own.
pub(super) struct Management {
    pub stop: CancellationToken,
    pub server: tokio::task::JoinHandle<()>,
}

pub(super) fn serve(platform: &Platform, listeners: Vec<TcpListener>, tasks: &mut Tasks) -> Management {
    let config = platform.settings.http.clone();
    let router = ops::router(platform.health.clone(), platform.metrics.clone());
    let (stop, died) = (CancellationToken::new(), CancellationToken::new());
    tasks.watch("management port", died.clone());
    let guard = died.clone().drop_guard();
    let ending = Ending { draining: Draining::default(), died, stop: stop.clone(), grace: Duration::from_secs(1) };
    let server = tokio::spawn(async move {
        let _guard = guard;
        serve::serve(
            serve::Audience::Operators,
            listeners,
            router,
            ShortCuts::default(),
            &config,
            Proxies::default(),
            ending,
        )
        .await;
    });
    Management { stop, server }
}
