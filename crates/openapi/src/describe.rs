//! Parts of descriptions that capabilities share.

use std::collections::BTreeMap;

use utoipa::{
    IntoResponses,
    openapi::{OpenApi, OpenApiBuilder, RefOr, Response, ResponseBuilder, tag::TagBuilder},
};

/// Returns a description with the tag of a capability's operations, and a sentence about them.
pub fn tagged(name: &str, text: &str) -> OpenApi {
    let tag = TagBuilder::new().name(name).description(Some(text)).build();
    OpenApiBuilder::new().tags(Some([tag])).build()
}

/// Error answers of routes that read nothing of a request but its head.
pub enum NoInput {}

impl IntoResponses for NoInput {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        // The HTTP layer refuses such a request before any route, without a body.
        let response = ResponseBuilder::new().description("The head of the request is too large").build();
        [("431".to_owned(), response.into())].into()
    }
}
