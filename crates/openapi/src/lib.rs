//! The API description of a listener, and the pages that lead to it: `GET /` says what this is,
//! `/openapi.json` is the description, `/docs` shows it in a browser.
//!
//! Capabilities describe their own routes. This crate adds the head of the document and serves it.
//! The API and the management port are different listeners, and only some roles have the API, so
//! each listener serves a description of its own routes.

mod asset;
mod describe;
mod index;
mod negotiation;
mod reference;

use std::sync::Arc;

use asset::Asset;
use axum::{
    Router,
    body::Body,
    extract::State,
    http::{HeaderMap, Response},
};
use utoipa::openapi::{InfoBuilder, LicenseBuilder, OpenApi, OpenApiBuilder, Server, security::SecurityRequirement};
use utoipa_axum::{router::OpenApiRouter, routes};

pub use describe::{NoInput, operations, operations_mut, tagged};

/// Tag of routes that every listener has.
pub const SERVICE: &str = "service";

/// The reason why a description cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the API description cannot be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error("a page cannot be compressed: {0}")]
    Compression(#[from] std::io::Error),
}

/// Returns the head of a description: what is served, without any route.
pub fn head(title: &str, text: &str) -> OpenApi {
    let license = LicenseBuilder::new().name("Apache-2.0").identifier(Some("Apache-2.0")).build();
    let info = InfoBuilder::new()
        .title(title)
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(text))
        .license(Some(license))
        .build();
    OpenApiBuilder::new()
        .info(info)
        // Relative to the address that the description was read from.
        .servers(Some([Server::new("/")]))
        // No operation needs credentials.
        .security(Some([] as [SecurityRequirement; 0]))
        .build()
}

/// The pages of a listener.
struct Pages {
    document: Asset,
    index_json: Asset,
    index_html: Asset,
    reference: Asset,
}

/// Returns a router with these routes and `/`, `/openapi.json` and, if `docs` is set, `/docs`.
/// `finish` completes the description of all of them.
pub fn serve(described: OpenApiRouter, docs: bool, finish: impl FnOnce(&mut OpenApi)) -> Result<Router, Error> {
    let head = tagged(SERVICE, "What this process serves, and how it does.");
    let mut own = OpenApiRouter::with_openapi(head).routes(routes!(index)).routes(routes!(document));
    if docs {
        own = own.routes(routes!(docs_page));
    }
    let (own, own_description) = own.split_for_parts();
    let (router, mut description) = described.split_for_parts();
    description.merge(own_description);
    finish(&mut description);
    let (index_json, index_html) = index::pages(&description, docs)?;
    let document = Asset::new("application/json", description.to_pretty_json()?)?;
    let pages = Pages { document, index_json, index_html, reference: reference::page(&description.info.title)? };
    let router = router.merge(own.with_state(Arc::new(pages)));
    Ok(if docs { router.merge(reference::files()?) } else { router })
}

/// Show what this is
///
/// Names the description of the API and lists its operations, as JSON or, for browsers, as HTML.
#[utoipa::path(
    get,
    path = "/",
    operation_id = "getIndex",
    tag = SERVICE,
    responses(
        (status = 200, description = "The index", content((index::Index = "application/json"), (String = "text/html"))),
        NoInput,
    ),
)]
async fn index(State(pages): State<Arc<Pages>>, headers: HeaderMap) -> Response<Body> {
    let page = if negotiation::prefers_html(&headers) { &pages.index_html } else { &pages.index_json };
    page.answer(&headers)
}

/// Read this description
#[utoipa::path(
    get,
    path = "/openapi.json",
    operation_id = "getApiDescription",
    tag = SERVICE,
    responses(
        (status = 200, description = "The description, in OpenAPI 3.1", body = serde_json::Map<String, serde_json::Value>, content_type = "application/json"),
        (status = 304, description = "The client has it: `If-None-Match` names its `ETag`"),
        NoInput,
    ),
)]
async fn document(State(pages): State<Arc<Pages>>, headers: HeaderMap) -> Response<Body> {
    pages.document.answer(&headers)
}

/// Browse this description
///
/// Shows the operations as a page, and can send requests. `http.docs` turns it off.
#[utoipa::path(
    get,
    path = "/docs",
    operation_id = "getApiReference",
    tag = SERVICE,
    responses((status = 200, description = "The page", body = String, content_type = "text/html"), NoInput),
)]
async fn docs_page(State(pages): State<Arc<Pages>>, headers: HeaderMap) -> Response<Body> {
    pages.reference.answer(&headers)
}
