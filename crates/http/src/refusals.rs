//! Error answers that several routes share, for use in their descriptions, as in
//! `responses((status = 200, …), JsonWrite)`.

use utoipa::{
    ToSchema,
    openapi::{ContentBuilder, Ref, Response, ResponseBuilder},
};

use super::ProblemBody;

#[macro_export]
/// Defines types for sets of error answers: each status, with its meaning.
macro_rules! refusals {
    ($($(#[$doc:meta])* $visibility:vis $name:ident { $($status:literal: $meaning:literal),+ $(,)? })+) => {$(
        $(#[$doc])*
        $visibility enum $name {}

        impl utoipa::IntoResponses for $name {
            fn responses() -> std::collections::BTreeMap<String, utoipa::openapi::RefOr<utoipa::openapi::Response>> {
                let refusal = |meaning| $crate::refusals::refusal(meaning).into();
                [$(($status.to_string(), refusal($meaning))),+].into()
            }
        }
    )+};
}
pub use crate::refusals;

refusals! {
    /// Error answers of routes that read a JSON body.
    pub JsonBody { 408: "Body too slow", 413: "Too large", 415: "Not JSON" }
    /// Error answers of routes that read a JSON body and write it to Kafka or Postgres.
    pub JsonWrite { 408: "Body too slow", 413: "Too large", 415: "Not JSON", 503: "Refused, or outcome unknown" }
    /// Error answers of routes that read Postgres.
    pub PostgresRead { 400: "Malformed", 503: "Postgres cannot be reached" }
}

/// Describes an error answer.
pub fn refusal(meaning: &str) -> Response {
    let schema = Ref::from_schema_name(ProblemBody::name());
    let content = ContentBuilder::new().schema(Some(schema)).build();
    ResponseBuilder::new().description(meaning).content("application/problem+json", content).build()
}
