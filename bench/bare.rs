//! The ceiling: a minimal axum server whose routes return a constant.
//!
//! Usage: `bare ADDRESS`. The routes have the product's paths, so the same load scripts work for both. A POST reads its
//! body, as the product does, and ignores it.

use std::{env, error::Error};

use axum::{
    Router,
    body::Bytes,
    http::header,
    response::IntoResponse,
    routing::{get, post},
};

const ANSWER: &str = r#"{"success":true}"#;

async fn read() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], ANSWER)
}

async fn write(_body: Bytes) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], ANSWER)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let address = env::args().nth(1).unwrap_or_else(|| "127.0.0.1:3000".to_owned());
    let routes =
        Router::new().route("/", get(read).post(write)).route("/produce", post(write)).route("/pull/{key}", get(read));
    let listener = tokio::net::TcpListener::bind(address).await?;
    axum::serve(listener, routes).await?;
    Ok(())
}
