//! Implements `postrider config show --running`: the configuration that a process uses.

use std::time::Duration;

use axum::http::StatusCode;
use postrider_config::{self as config, Shown};

use super::{api, block_on, text};
use crate::roles::Settings;

/// Time within which a process must answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The reason why the configuration of a process cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no process answers: {0}; pass its management address with --management")]
    Silent(#[source] api::Error),
    #[error(transparent)]
    Api(api::Error),
    #[error("{url} answered {}: is that the management port of this version of postrider?", .status.as_u16())]
    Answered { url: String, status: StatusCode },
    #[error("{url} is no configuration: {source}")]
    NotShown { url: String, source: serde_json::Error },
    #[error(transparent)]
    Print(#[from] text::Error),
}

/// Returns the management addresses of processes on this machine with this configuration.
pub fn local_addresses(settings: &Settings) -> Vec<String> {
    settings.management.listen.iter().map(|listen| format!("http://{}", reachable(listen))).collect()
}

/// Returns where a client on this machine reaches a server that listens at this address.
fn reachable(listen: &str) -> String {
    let (host, port) = listen.rsplit_once(':').unwrap_or(("", listen));
    match host {
        "" | "0.0.0.0" => format!("127.0.0.1:{port}"),
        "[::]" => format!("[::1]:{port}"),
        host => format!("{host}:{port}"),
    }
}

/// Prints the configuration of the process with this management address.
pub fn show(address: &str) -> Result<(), super::Error> {
    block_on(async {
        let api = api::Api::of_management(address).map_err(Error::Api)?;
        let url = format!("{}/config", api.shown());
        let answer = tokio::time::timeout(TIMEOUT, api.get("/config")).await;
        let answer = answer.unwrap_or(Err(api::Error::TimedOut(TIMEOUT))).map_err(Error::Silent)?;
        if answer.status != StatusCode::OK {
            return Err(Error::Answered { url, status: answer.status });
        }
        let shown: Vec<Shown> =
            serde_json::from_value(answer.json()).map_err(|source| Error::NotShown { url, source })?;
        text::print(&config::lines(&shown))?;
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_here_is_reached_at_the_host_that_it_listens_on() {
        for (listen, reached) in [
            (":9090", "127.0.0.1:9090"),
            ("0.0.0.0:9090", "127.0.0.1:9090"),
            ("[::]:9090", "[::1]:9090"),
            ("10.0.0.7:9090", "10.0.0.7:9090"),
            ("[fd00::1]:9090", "[fd00::1]:9090"),
        ] {
            assert_eq!(reachable(listen), reached);
        }
    }
}
