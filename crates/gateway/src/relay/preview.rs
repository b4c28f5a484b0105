//! Shows the request of a delivery without sending it.

use axum::http::HeaderMap;
use postrider_kafka::batch::Record;
use postrider_outbound::{Client, ConnectError, Endpoint};
use serde::Serialize;
use serde_json::{Map, Value, value::RawValue};

use super::{Config, Problem, envelope::Envelope, request, route};
use crate::relay::Access;

/// Text shown in place of the value of a configured header, which may be a secret.
const MASK: &str = "********";

/// Renders the requests of one route.
pub struct Preview {
    topic: String,
    client: Client,
    endpoint: Endpoint,
    /// Headers of every request. Configured ones are masked.
    headers: HeaderMap,
    envelope: Envelope,
}

#[derive(Serialize)]
struct Shown<'a> {
    method: &'static str,
    url: &'a str,
    headers: Map<String, Value>,
    body: &'a RawValue,
}

impl Preview {
    /// Returns the error of a configuration that [`super::Route::new`] would refuse.
    pub fn new(config: &Config, access: Access) -> Result<Self, Problem> {
        let (client, endpoint) = route::connectors(config, access)?;
        let mut headers = endpoint.headers(request::MORE_HEADERS);
        let defaults = HeaderMap::from_iter(request::HEADERS);
        for (name, value) in &mut headers {
            if defaults.get(name) != Some(&*value) {
                *value = axum::http::HeaderValue::from_static(MASK);
            }
        }
        let topic = config.topic.clone();
        Ok(Self { envelope: Envelope::new(&topic), topic, client, endpoint, headers })
    }

    /// Returns the error of a target that no request would reach because its address is refused, or
    /// its name cannot be resolved. If all addresses are permitted, it is not looked up.
    pub async fn check_target(&self) -> Result<(), ConnectError> {
        self.client.check(&self.endpoint).await
    }

    /// Returns the request of a record as JSON: method, URL, headers and body.
    pub fn request(&self, partition: i32, record: &Record<'_>) -> Result<String, serde_json::Error> {
        let mut headers = self.headers.clone();
        request::add_headers(&mut headers, &self.topic, partition, record);
        let text = |value: &axum::http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
        let headers = headers.iter().map(|(name, value)| (name.as_str().to_owned(), text(value).into())).collect();
        let body = request::body(&self.envelope, partition, record);
        let body: &RawValue = serde_json::from_slice(&body)?;
        serde_json::to_string(&Shown { method: "POST", url: self.endpoint.shown(), headers, body })
    }
}

#[cfg(test)]
mod tests {
    use postrider_config::{Secret, SecretUrl};
    use postrider_kafka::batch::Batch;
    use rdkafka::{Timestamp, message::OwnedMessage};

    use super::*;

    #[test]
    fn a_preview_has_the_request_and_no_secret() {
        let config = Config {
            name: "r".to_owned(),
            topic: "t".to_owned(),
            target_url: SecretUrl::new("http://user:hidden1@example.com/hook"),
            headers: [("authorization".to_owned(), Secret::new("Bearer hidden2"))].into_iter().collect(),
            ..Config::default()
        };
        let preview = Preview::new(&config, Access::Any).unwrap();
        let time = Timestamp::CreateTime(1_672_574_400_000);
        let mut batch = Batch::default();
        batch.push(&OwnedMessage::new(Some(b"{\"n\":1}".to_vec()), None, "t".to_owned(), time, 3, 7, None));
        let shown = preview.request(3, &batch.record(0)).unwrap();
        let json: Value = serde_json::from_str(&shown).unwrap();
        assert_eq!(json["body"]["value"]["n"], 1, "{shown}");
        assert_eq!(
            (&json["headers"]["authorization"], &json["headers"]["idempotency-key"]),
            (&MASK.into(), &"t/3@7".into())
        );
        assert!(
            json["url"].as_str().unwrap().ends_with("example.com/********") && !shown.contains("hidden"),
            "{shown}"
        );
    }
}
