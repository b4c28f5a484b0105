//! Arguments of the commands that talk to the API.

use clap::Args;

#[derive(Args)]
#[command(next_help_heading = "Server")]
pub struct Server {
    /// URL of the API
    #[arg(long, env = "API_URL", value_name = "URL", default_value = "http://127.0.0.1:8080")]
    pub api: String,
}
