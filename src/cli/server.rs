//! Arguments of the commands that talk to the API.

use clap::Args;

use super::api::{Api, Error, LOCAL};

#[derive(Args)]
#[command(next_help_heading = "Server")]
pub struct Server {
    /// URL of the API. The variable API_KEY has the API key or token to send, if one is needed
    #[arg(long, env = "API_URL", value_name = "URL", default_value = LOCAL)]
    api: String,
}

impl Server {
    pub fn client(&self) -> Result<Api, Error> {
        client(&self.api, "--api")
    }
}

/// Returns the client of the API at this URL, which this option gave. An empty one, as compose
/// files set a variable that is not given, is the default.
pub fn client(url: &str, option: &'static str) -> Result<Api, Error> {
    Api::new(if url.is_empty() { LOCAL } else { url }, option)
}
