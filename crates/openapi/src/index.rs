//! The page at `/`: what this is, and which operations it has.

use std::fmt::Write;

use axum::http::HeaderValue;
use base64::{Engine, prelude::BASE64_STANDARD};
use serde::Serialize;
use sha2::{Digest, Sha256};
use utoipa::{
    ToSchema,
    openapi::{OpenApi, path::Operation},
};

use super::{Error, asset::Asset, describe::operations};

const STYLE: &str = ":root{color-scheme:light dark;font-family:system-ui,sans-serif;line-height:1.5}\
    body{max-width:56rem;margin:2rem auto;padding:0 1rem}table{border-collapse:collapse}\
    td{padding:.1rem 1rem .1rem 0;vertical-align:top}";

/// Operations of a listener.
#[derive(Serialize, ToSchema)]
#[schema(as = ServiceIndex)]
pub struct Index {
    name: String,
    version: String,
    description: String,
    /// Path of the description in OpenAPI.
    openapi: &'static str,
    /// Path of the page that shows the description, if `http.docs` is on.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    docs: Option<&'static str>,
    /// The operations, by capability.
    groups: Vec<Group>,
}

/// Operations of one capability.
#[derive(Serialize, ToSchema)]
#[schema(as = IndexGroup)]
struct Group {
    name: String,
    description: String,
    operations: Vec<Entry>,
}

/// An operation.
#[derive(Serialize, ToSchema)]
#[schema(as = IndexOperation)]
struct Entry {
    method: &'static str,
    path: String,
    summary: String,
}

/// Returns the index as JSON and as HTML.
pub fn pages(description: &OpenApi, docs: bool) -> Result<(Asset, Asset), Error> {
    let index = Index::new(description, docs);
    let hash = BASE64_STANDARD.encode(Sha256::digest(STYLE));
    let policy = format!(
        "default-src 'none'; style-src 'sha256-{hash}'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let html = Asset::new("text/html; charset=utf-8", index.html())?;
    let html = match HeaderValue::try_from(policy) {
        Ok(policy) => html.with_policy(policy),
        Err(_) => html,
    };
    Ok((Asset::new("application/json", serde_json::to_vec_pretty(&index)?)?, html))
}

impl Index {
    fn new(description: &OpenApi, docs: bool) -> Self {
        let groups = description.tags.iter().flatten().map(|tag| Group {
            name: tag.name.clone(),
            description: tag.description.clone().unwrap_or_default(),
            operations: entries(description, &tag.name),
        });
        Self {
            name: description.info.title.clone(),
            version: description.info.version.clone(),
            description: description.info.description.clone().unwrap_or_default(),
            openapi: "/openapi.json",
            docs: docs.then_some("/docs"),
            groups: groups.filter(|group| !group.operations.is_empty()).collect(),
        }
    }

    fn html(&self) -> String {
        let (name, version, description) = (escaped(&self.name), escaped(&self.version), escaped(&self.description));
        let docs = if self.docs.is_some() { "<a href=\"docs\">API reference</a> · " } else { "" };
        let mut html = format!(
            r#"<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<h1>{name} {version}</h1>
<p>{description}</p>
<p>{docs}<a href="openapi.json">OpenAPI description</a></p>
"#
        );
        for group in &self.groups {
            html.push_str(&format!(
                "<h2>{}</h2>\n<p>{}</p>\n<table>\n",
                escaped(&group.name),
                escaped(&group.description)
            ));
            for Entry { method, path, summary } in &group.operations {
                let (path, summary) = (escaped(path), escaped(summary));
                // Writing to a string does not fail.
                let _ = writeln!(html, "<tr><td><code>{method} {path}</code></td><td>{summary}</td></tr>");
            }
            html.push_str("</table>\n");
        }
        html.push_str("</body>\n</html>\n");
        html
    }
}

/// Returns the operations with this tag, by path.
fn entries(description: &OpenApi, tag: &str) -> Vec<Entry> {
    let all = description
        .paths
        .paths
        .iter()
        .flat_map(|(path, item)| operations(item).map(move |(method, operation)| (path, method, operation)));
    let tagged = all.filter(|(_, _, operation)| operation.tags.iter().flatten().any(|name| name == tag));
    let entry = |(path, method, operation): (&String, _, &Operation)| Entry {
        method,
        path: path.clone(),
        summary: operation.summary.clone().unwrap_or_default(),
    };
    tagged.map(entry).collect()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
