//! RFC 9457 problem details, the format of every error answer.

use axum::{
    body::Body,
    http::{HeaderValue, Response, header},
    response::IntoResponse,
};
use postrider_identity::{Denied, Missing, NotOwn, Permission};
use postrider_kafka::SendError;
use serde::Serialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::{code::Code, decode::segment, encoding};

/// The part of a request that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A value in the body: its JSON pointer as a fragment, such as `#/headers/a`.
    Pointer(String),
    /// A parameter in the query or the path.
    Parameter(String),
    Header(&'static str),
}

/// Codes of answers that are sent while the rest of the request may still be arriving.
const LEAVE_BODY: [Code; 4] =
    [Code::BODY_TOO_LARGE, Code::REQUEST_TIMEOUT, Code::UNSUPPORTED_ENCODING, Code::INVALID_BODY];

/// Marks an answer that is sent while the rest of the request may still be arriving.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LeavesBody;

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

    /// Adds the member `errors`, which says what in the request is wrong.
    #[must_use]
    pub fn at(self, place: Place) -> Self {
        let detail = self.detail.clone();
        self.at_with(place, &detail)
    }

    /// Like [`Self::at`], with a detail of its own, for one of several errors.
    #[must_use]
    pub fn at_with(mut self, place: Place, detail: &str) -> Self {
        let (kind, name) = match place {
            Place::Pointer(pointer) => ("pointer", pointer),
            Place::Parameter(name) => ("parameter", name),
            Place::Header(name) => ("header", name.to_owned()),
        };
        let error = json!({kind: name, "detail": detail});
        match self.extensions.get_mut("errors") {
            Some(Value::Array(errors)) => errors.push(error),
            _ => drop(self.extensions.insert("errors".to_owned(), Value::Array(vec![error]))),
        }
        self
    }

    /// Makes the pointers lead to a value inside of the one at `pointer`, such as `/records/3`.
    #[must_use]
    pub fn within(mut self, pointer: &str) -> Self {
        for error in self.extensions.get_mut("errors").and_then(Value::as_array_mut).into_iter().flatten() {
            let inner = error.get("pointer").and_then(Value::as_str).and_then(|inner| inner.strip_prefix('#'));
            if let Some(outer) = inner.map(|inner| format!("#{pointer}{inner}")) {
                error["pointer"] = outer.into();
            }
        }
        self
    }

    /// Names the field of the body that is wrong.
    #[must_use]
    pub fn at_field(self, name: &str) -> Self {
        self.at(Place::Pointer(format!("#{}", segment(name))))
    }

    /// Names the parameter in the query or the path that is wrong.
    #[must_use]
    pub fn at_parameter(self, name: &str) -> Self {
        self.at(Place::Parameter(name.to_owned()))
    }

    /// Names the header that is wrong.
    #[must_use]
    pub fn at_header(self, name: &'static str) -> Self {
        self.at(Place::Header(name))
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
        if self.code == Code::UNAUTHENTICATED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.code == Code::UNSUPPORTED_ENCODING {
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static(encoding::ACCEPTED));
        }
        if LEAVE_BODY.contains(&self.code) {
            response.extensions_mut().insert(LeavesBody);
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
            SendError::TooLarge { .. } => Code::BODY_TOO_LARGE,
            SendError::Unknown => Code::OUTCOME_UNKNOWN,
            SendError::Rejected(_) => Code::KAFKA_REJECTED,
        };
        Self::new(code, error.to_string())
    }
}

/// Converts a credential that is not accepted.
impl From<Denied> for Problem {
    fn from(denied: Denied) -> Self {
        let code = match denied {
            Denied::Unavailable(_) => Code::AUTHENTICATION_UNAVAILABLE,
            _ => Code::UNAUTHENTICATED,
        };
        Self::new(code, denied.to_string())
    }
}

/// Converts the lack of a scope.
impl From<Missing> for Problem {
    fn from(missing: Missing) -> Self {
        Self::new(Code::FORBIDDEN, missing.to_string()).with("scope", missing.scope)
    }
}

/// Converts a request for another subject.
impl From<NotOwn> for Problem {
    fn from(error: NotOwn) -> Self {
        Self::new(Code::FORBIDDEN, error.to_string()).with("scope", Permission::ActForOthers.word())
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
    /// The scope that the credential lacks.
    #[schema(nullable = false)]
    pub scope: Option<String>,
    /// Part of the request that is wrong, if it is a field, a parameter or a header.
    #[schema(nullable = false)]
    pub errors: Option<Vec<ProblemItem>>,
}

/// Fault of one part of a request.
#[derive(Serialize, ToSchema)]
pub struct ProblemItem {
    /// JSON pointer of the value in the body, as a fragment, such as `#/headers/a`.
    #[schema(nullable = false)]
    pub pointer: Option<String>,
    /// Name of the parameter in the query or the path.
    #[schema(nullable = false)]
    pub parameter: Option<String>,
    /// Name of the header.
    #[schema(nullable = false)]
    pub header: Option<String>,
    /// Description of the fault: the value that was found, and the one that is wanted.
    pub detail: String,
}
