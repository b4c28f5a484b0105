//! Follows the comments, and resumes after the last one that it has seen.

use std::error::Error;

use futures_util::StreamExt;
use reqwest::{Client, Response};

type Outcome<T> = Result<T, Box<dyn Error>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Outcome<()> {
    let api = std::env::var("API_URL").unwrap_or("http://127.0.0.1:8080".to_owned());
    let stream = open(&api, None).await?;
    for text in ["one", "two"] {
        let comment = Client::new().post(format!("{api}/api/v1/comments")).json(&serde_json::json!({"text": text}));
        comment.send().await?.error_for_status()?;
    }
    let (id, first) = first_event(stream).await?;
    let (_, second) = first_event(open(&api, Some(&id)).await?).await?;
    println!("{first}\n{second}");
    Ok(())
}

async fn open(api: &str, last_id: Option<&str>) -> Outcome<Response> {
    let request = Client::new().get(format!("{api}/api/v1/comments/stream"));
    let request = last_id.into_iter().fold(request, |request, id| request.header("Last-Event-ID", id));
    Ok(request.send().await?.error_for_status()?)
}

/// Returns the id and the data of the first server-sent event.
async fn first_event(stream: Response) -> Outcome<(String, String)> {
    let (mut parts, mut text) = (stream.bytes_stream(), String::new());
    while let Some(part) = parts.next().await {
        text.push_str(str::from_utf8(&part?)?);
        let field =
            |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned());
        if let (Some(id), Some(data), true) = (field("id:"), field("data:"), text.ends_with("\n\n")) {
            return Ok((id, data));
        }
    }
    Err("the stream ended".into())
}
