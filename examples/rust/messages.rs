//! Sends a message and receives it from a WebSocket.

use futures_util::StreamExt;
use reqwest::Client;
use serde_json::{Value, json};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let api = std::env::var("API_URL").unwrap_or("http://127.0.0.1:8080".to_owned());
    let url = format!("{}/api/v1/websocket/message?receiverId=rust", api.replacen("http", "ws", 1));
    let (mut socket, _) = tokio_tungstenite::connect_async(url).await?;
    let message = json!({"chatId": "c", "senderId": "ann", "receiverId": "rust", "content": "hello"});
    Client::new().post(format!("{api}/api/v1/message/action")).json(&message).send().await?.error_for_status()?;
    while let Some(frame) = socket.next().await {
        let frame = frame?;
        if frame.is_text() {
            println!("{}", serde_json::from_str::<Value>(frame.to_text()?)?["content"]);
            break;
        }
    }
    Ok(())
}
