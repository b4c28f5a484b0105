//! The page at `/docs`: Swagger UI, from the files in `assets`, without a request to another host.
//!
//! Swagger UI is maintained, runs under a strict policy, shows OpenAPI 3.1 and can send requests.
//! It has a quarter of the size of Scalar, which also loads fonts from elsewhere. Redoc shows a
//! logo from elsewhere, and RapiDoc has had no release for two years.

use std::{io, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, HeaderValue},
    routing::get,
};

use super::asset::Asset;

/// Policy of the browser for the page: it may load only files of this listener, and the images in
/// the style sheet.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Starts Swagger UI. `validatorUrl` is null because the default asks another host.
const START: &str = "SwaggerUIBundle({url: 'openapi.json', dom_id: '#swagger-ui', deepLinking: true, \
    displayRequestDuration: true, validatorUrl: null});\n";

/// Returns the page.
pub fn page(title: &str) -> io::Result<Asset> {
    // Addresses are relative, so that the page also works below a path of a proxy.
    let html = format!(
        r#"<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<noscript>This page needs JavaScript. The description is at <a href="openapi.json">openapi.json</a>.</noscript>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"#
    );
    Ok(Asset::new("text/html; charset=utf-8", html)?.with_policy(HeaderValue::from_static(POLICY)))
}

/// Returns the files that the page loads, and their licences.
pub fn files() -> io::Result<Router> {
    let script = "text/javascript; charset=utf-8";
    let text = "text/plain; charset=utf-8";
    let licence = include_str!("../assets/LICENSE");
    let licences = include_str!("../assets/swagger-ui-bundle.js.LICENSE.txt");
    let files = [
        ("/docs/start.js", Asset::new(script, START)?),
        (
            "/docs/swagger-ui-bundle.js",
            Asset::compressed(script, &include_bytes!("../assets/swagger-ui-bundle.js.gz")[..]),
        ),
        (
            "/docs/swagger-ui.css",
            Asset::compressed("text/css; charset=utf-8", &include_bytes!("../assets/swagger-ui.css.gz")[..]),
        ),
        ("/docs/LICENSE", Asset::new(text, licence)?),
        ("/docs/swagger-ui-bundle.js.LICENSE.txt", Asset::new(text, licences)?),
    ];
    Ok(files.into_iter().fold(Router::new(), |router, (path, asset)| {
        let answer = |State(asset): State<Arc<Asset>>, headers: HeaderMap| async move { asset.answer(&headers) };
        router.route(path, get(answer).with_state(Arc::new(asset)))
    }))
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use flate2::read::GzDecoder;
    use sha2::{Digest, Sha256};

    #[test]
    fn the_files_are_those_of_the_package() {
        let table = include_str!("../assets/README.md");
        for (name, packed) in [
            ("swagger-ui-bundle.js", &include_bytes!("../assets/swagger-ui-bundle.js.gz")[..]),
            ("swagger-ui.css", &include_bytes!("../assets/swagger-ui.css.gz")[..]),
        ] {
            let mut plain = Vec::new();
            GzDecoder::new(packed).read_to_end(&mut plain).unwrap();
            let hash: String = Sha256::digest(&plain).iter().map(|byte| format!("{byte:02x}")).collect();
            assert!(table.contains(&format!("| `{name}` | `{hash}` |")), "{name} {hash}");
        }
    }
}
