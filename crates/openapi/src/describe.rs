//! Parts of descriptions that capabilities share.

use std::collections::BTreeMap;

use utoipa::{
    IntoResponses,
    openapi::{OpenApi, OpenApiBuilder, PathItem, RefOr, Response, ResponseBuilder, path::Operation, tag::TagBuilder},
};

/// Returns a description with the tag of a capability's operations, and a sentence about them.
pub fn tagged(name: &str, text: &str) -> OpenApi {
    let tag = TagBuilder::new().name(name).description(Some(text)).build();
    OpenApiBuilder::new().tags(Some([tag])).build()
}

/// Lists the operations of a path, each with its method; `$by` is how they are borrowed.
macro_rules! each_operation {
    ($item:ident, $($by:tt)+) => {
        [
            ("GET", $($by)+ $item.get),
            ("POST", $($by)+ $item.post),
            ("PUT", $($by)+ $item.put),
            ("PATCH", $($by)+ $item.patch),
            ("DELETE", $($by)+ $item.delete),
            ("OPTIONS", $($by)+ $item.options),
            ("HEAD", $($by)+ $item.head),
            ("TRACE", $($by)+ $item.trace),
        ]
    };
}

/// Returns the operations of a path, each with its method.
pub fn operations(item: &PathItem) -> impl Iterator<Item = (&'static str, &Operation)> {
    let all = each_operation!(item, &);
    all.into_iter().filter_map(|(method, operation)| Some((method, operation.as_ref()?)))
}

/// Like [`operations`], to change them.
pub fn operations_mut(item: &mut PathItem) -> impl Iterator<Item = (&'static str, &mut Operation)> {
    let all = each_operation!(item, &mut);
    all.into_iter().filter_map(|(method, operation)| Some((method, operation.as_mut()?)))
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
