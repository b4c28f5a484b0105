//! Writes a batch of records to a topic and prints where each one is.

use reqwest::Client;
use serde_json::{Value, json};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let api = std::env::var("API_URL").unwrap_or("http://127.0.0.1:8080".to_owned());
    let topic = std::env::var("TOPIC").unwrap_or("example".to_owned());
    let batch = json!({"topic": topic, "records": [{"key": "a", "payload": 1}, {"key": "b", "payload": [2]}]});
    let answer = Client::new().post(format!("{api}/produce")).json(&batch).send().await?;
    let stored: Value = answer.error_for_status()?.json().await?;
    for result in stored["results"].as_array().into_iter().flatten() {
        println!("{} {}", result["partition"], result["offset"]);
    }
    Ok(())
}
