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
    Silent(#[from] api::Error),
    #[error("{url} answered {}: is that the management port of this version of postrider?", .status.as_u16())]
    Answered { url: String, status: StatusCode },
    #[error("{url} is no configuration: {source}")]
    NotShown { url: String, source: serde_json::Error },
    #[error(transparent)]
    Print(#[from] text::Error),
}

/// Returns the management addresses of processes on this machine with this configuration.
pub fn local_addresses(settings: &Settings) -> Vec<String> {
    let local = |listen: &String| format!("http://127.0.0.1:{}", listen.rsplit(':').next().unwrap_or_default());
    settings.management.listen.iter().map(local).collect()
}

/// Prints the configuration of the process with this management address.
pub fn show(address: &str) -> Result<(), super::Error> {
    block_on(async {
        let api = api::Api::new(address)?;
        let url = format!("{}/config", api.shown());
        let answer = tokio::time::timeout(TIMEOUT, api.get("/config")).await;
        let answer = answer.map_err(|_| api::Error::TimedOut(TIMEOUT))??;
        if answer.status != StatusCode::OK {
            return Err(Error::Answered { url, status: answer.status });
        }
        let shown: Vec<Shown> =
            serde_json::from_value(answer.json()).map_err(|source| Error::NotShown { url, source })?;
        text::print(&config::lines(&shown))?;
        Ok(())
    })
}
