//! Writes a value and reads it back: the read waits until it sees the write.

use reqwest::Client;
use serde_json::{Value, json};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let api = std::env::var("API_URL").unwrap_or("http://127.0.0.1:8080".to_owned());
    let value = json!({"key": "rust", "value": {"visits": 2}});
    let pushed = Client::new().post(format!("{api}/push")).json(&value).send().await?.error_for_status()?;
    let position = &pushed.headers()["Postrider-Position"];
    let pull = Client::new().get(format!("{api}/pull/rust")).header("Postrider-After", position);
    let pulled: Value = pull.send().await?.error_for_status()?.json().await?;
    println!("{}", pulled["value"]);
    Ok(())
}
