//! RFC 9457 problem details, the format of every error answer.

use axum::{
    body::Body,
    http::{HeaderValue, Response, header},
    response::IntoResponse,
};
use postrider_kafka::SendError;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::code::Code;

/// An error answer. The outer layer turns it into a response and fills in `instance`.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{}: {detail}", .code.word)]
pub struct Problem {
    pub code: Code,
    /// A sentence about this occurrence.
    pub detail: String,
    /// Value of `Retry-After`, in seconds.
    pub retry_after_s: Option<u32>,
    /// Extension members, where a contract defines some.
    pub extensions: Map<String, Value>,
}

impl Problem {
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        let retry_after_s = matches!(code.status.as_u16(), 429 | 503).then_some(1);
        Self { code, detail: detail.into(), retry_after_s, extensions: Map::new() }
    }

    /// Returns the answer to a request for which Postgres could not be read or written.
    pub fn postgres_unavailable(error: impl std::fmt::Display) -> Self {
        Self::new(Code::POSTGRES_UNAVAILABLE, error.to_string())
    }

    /// Adds an extension member.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.extensions.insert(name.to_owned(), value.into());
        self
    }

    /// Returns the JSON object; `instance` is the request's path.
    pub fn to_json(&self, instance: Option<&str>) -> Value {
        let mut object = self.extensions.clone();
        object.insert("type".into(), format!("urn:postrider:error:{}", self.code.word).into());
        object.insert("title".into(), self.code.title.into());
        object.insert("status".into(), self.code.status.as_u16().into());
        object.insert("detail".into(), self.detail.clone().into());
        object.insert("code".into(), self.code.word.into());
        if let Some(instance) = instance {
            object.insert("instance".into(), instance.into());
        }
        Value::Object(object)
    }

    /// Returns the complete response for the request at `instance`.
    pub fn respond(&self, instance: Option<&str>) -> Response<Body> {
        let mut response = Response::new(Body::from(self.to_json(instance).to_string()));
        *response.status_mut() = self.code.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// Converts the error of a record for one of postrider's topics that is not known to be stored.
impl From<SendError> for Problem {
    fn from(error: SendError) -> Self {
        let code = match &error {
            SendError::Full => Code::OVERLOADED,
            SendError::Unavailable | SendError::UnknownTopic(_) | SendError::UnknownPartition => {
                Code::KAFKA_UNAVAILABLE
            }
            SendError::TooLarge => Code::BODY_TOO_LARGE,
            SendError::Unknown => Code::OUTCOME_UNKNOWN,
            SendError::Rejected(_) => Code::KAFKA_REJECTED,
        };
        Self::new(code, error.to_string())
    }
}

/// Puts the problem into the response's extensions, until the outer layer, which knows the path,
/// renders it.
impl IntoResponse for Problem {
    fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = self.code.status;
        response.extensions_mut().insert(self);
        response
    }
}

/// An error answer (RFC 9457). Some errors have more members.
#[derive(ToSchema)]
#[schema(as = Problem)]
pub struct ProblemBody {
    /// `urn:postrider:error:` followed by the code.
    pub r#type: String,
    /// A summary, the same for every occurrence.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// A sentence about this occurrence.
    pub detail: String,
    /// The request's path.
    pub instance: String,
    /// The stable error code; see docs/errors.md.
    pub code: String,
    /// False, on routes whose successes have `success`.
    #[schema(nullable = false)]
    pub success: Option<bool>,
    /// The same as `detail`, on `/produce`.
    #[schema(nullable = false)]
    pub error: Option<String>,
}
