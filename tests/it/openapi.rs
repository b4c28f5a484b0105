//! The API descriptions, the tools that read them, and the pages that lead to them.

use std::collections::BTreeSet;

use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::{
    App, World,
    stack::off_runtime,
    tools::{Tools, chromium},
};

const BROWSER: &str = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8";

/// Starts a process with every route.
async fn complete(world: &World) -> App {
    world.app().env("POSTRIDER_GATEWAY__SIMULATOR__ENABLED", "true").start().await
}

#[tokio::test]
async fn the_descriptions_of_both_listeners_have_no_error_and_no_warning() {
    let world = World::new().await;
    let app = complete(&world).await;
    let api = app.get("/openapi.json").await.expect(200).json();
    let management = app.manage("/openapi.json").await.expect(200).json();
    let tools = Tools::new(&world);
    off_runtime(move || {
        tools.write("api.json", &api);
        tools.write("management.json", &management);
        Tools::expect(tools.python("openapi-spec-validator", &["api.json", "management.json"], &[]));
        assert_eq!(tools.problems("api.json"), [] as [Value; 0]);
        assert_eq!(tools.problems("management.json"), [] as [Value; 0]);

        // The checks find what they are for.
        let mut broken = api.clone();
        broken["paths"]["/push"]["post"]["operationId"] = broken["paths"]["/posts"]["post"]["operationId"].clone();
        tools.write("broken.json", &broken);
        let found: Vec<Value> = tools.problems("broken.json").iter().map(|problem| problem["ruleId"].clone()).collect();
        assert_eq!(found, ["operation-operationId-unique"]);
        broken["paths"]["/push"]["post"]["responses"]["202"] = json!({});
        tools.write("broken.json", &broken);
        assert!(!tools.python("openapi-spec-validator", &["broken.json"], &[]).0);
    })
    .await;
}

#[tokio::test]
async fn generated_clients_do_the_tour() {
    let world = World::new().await.with_postgres().await;
    let topic = world.make_topic("tour", 2).await;
    // Partitions as in the README. Streams end soon, since the clients read answers to their end.
    let app = world
        .app()
        .env("POSTRIDER_COMMENTS__PARTITIONS", "3")
        .env("POSTRIDER_COMMENTS__STREAM_MAX_AGE_MS", "500")
        .env("POSTRIDER_MESSAGES__STREAM_MAX_AGE_MS", "500")
        .env("POSTRIDER_MESSAGES__PRESENCE__HEARTBEAT_MS", "300")
        .env("POSTRIDER_MESSAGES__PRESENCE__LEASE_MS", "900")
        .start()
        .await;
    let api = app.get("/openapi.json").await.expect(200).json();
    let (tools, address) = (Tools::new(&world), app.api.clone());
    off_runtime(move || {
        tools.write("api.json", &api);
        let env = [("API_URL", address.as_str()), ("TOPIC", topic.as_str())];
        Tools::expect(tools.node("node_modules/openapi-typescript/bin/cli.js", &["api.json", "-o", "api.ts"], &[]));
        Tools::expect(tools.node("node_modules/typescript/bin/tsc", &[], &[]));
        Tools::expect(tools.node("out/tour.js", &[], &env));
        let words = ["generate", "--path", "api.json", "--config", "python.yaml", "--output-path", "client"];
        let said =
            Tools::expect(tools.python("openapi-python-client", &[&words[..], &["--meta", "none"]].concat(), &[]));
        // The generator knows no streams of JSON, and offers the other bodies of that operation.
        let warnings: Vec<&str> = said.lines().filter(|line| line.starts_with("WARNING")).collect();
        assert_eq!(warnings, ["WARNING parsing POST /produce within gateway."], "{said}");
        assert!(said.contains("Unsupported content type application/x-ndjson"), "{said}");
        Tools::expect(tools.python("python", &["tour.py"], &env));
    })
    .await;
}

/// Skipped where Chromium is not installed.
#[tokio::test]
async fn the_reference_and_the_index_work_in_a_browser_without_another_host() {
    let Some(browser) = chromium() else { return };
    let world = World::new().await;
    let app = complete(&world).await;
    let (tools, address) = (Tools::new(&world), app.api.clone());
    off_runtime(move || Tools::expect(tools.node("browser.mjs", &[browser, &address], &[]))).await;
}

#[tokio::test]
async fn the_index_lists_every_operation_as_json_or_html() {
    let world = World::new().await;
    let app = complete(&world).await;
    let described = app.get("/openapi.json").await.json();
    let index = app.get("/").await.expect(200);
    assert_eq!((index.header("content-type"), index.header("vary")), ("application/json", "accept, accept-encoding"));
    let index = index.json();
    assert_eq!(
        (&index["name"], &index["openapi"], &index["docs"]),
        (&json!("postrider"), &json!("/openapi.json"), &json!("/docs"))
    );
    assert_eq!(index["version"], described["info"]["version"]);
    assert_eq!(operations(&index), described_operations(&described));
    let html = app.request(Method::GET, "/", &[("accept", BROWSER)], "").await.expect(200);
    assert_eq!(html.header("content-type"), "text/html; charset=utf-8");
    for part in ["href=\"docs\"", "href=\"openapi.json\"", "/pull/{key}", "Store a value under a key"] {
        assert!(html.text().contains(part), "{part}");
    }
    let management = app.manage("/").await.expect(200).json();
    assert_eq!(operations(&management), described_operations(&app.manage("/openapi.json").await.json()));
    for path in ["/livez", "/readyz", "/startupz", "/consumers", "/metrics", "/openapi.json"] {
        assert!(operations(&management).contains(&format!("GET {path}")), "{path}");
        app.manage(path).await.expect(200);
    }
    assert_eq!(management["docs"], Value::Null);
}

/// Returns the operations that an index lists.
fn operations(index: &Value) -> BTreeSet<String> {
    let groups = index["groups"].as_array().unwrap().iter();
    let listed = groups.flat_map(|group| group["operations"].as_array().unwrap());
    listed.map(|one| format!("{} {}", one["method"].as_str().unwrap(), one["path"].as_str().unwrap())).collect()
}

fn described_operations(document: &Value) -> BTreeSet<String> {
    let paths = document["paths"].as_object().unwrap().iter();
    let operations = paths.flat_map(|(path, item)| item.as_object().unwrap().keys().map(move |method| (method, path)));
    operations.map(|(method, path)| format!("{} {path}", method.to_uppercase())).collect()
}

#[tokio::test]
async fn pages_are_compressed_and_sent_only_when_they_have_changed() {
    let world = World::new().await;
    let app = world.app().role("api").start().await;
    for path in ["/", "/openapi.json", "/docs", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css", "/docs/start.js"]
    {
        let plain = app.get(path).await.expect(200);
        assert_eq!((plain.header("content-encoding"), plain.header("cache-control")), ("", "no-cache"), "{path}");
        let packed = app.request(Method::GET, path, &[("accept-encoding", "gzip, br")], "").await.expect(200);
        assert_eq!(packed.header("content-encoding"), "gzip", "{path}");
        assert_eq!(packed.body[..2], [0x1f, 0x8b], "{path}");
        assert!(plain.body.len() < 1_000 || packed.body.len() < plain.body.len() / 2, "{path}");
        let known = app.request(Method::GET, path, &[("if-none-match", packed.header("etag"))], "").await.expect(304);
        assert!(known.body.is_empty() && known.header("content-type").is_empty(), "{path}");
        let head = app.request(Method::HEAD, path, &[], "").await.expect(200);
        assert_eq!(head.header("etag"), plain.header("etag"), "{path}");
    }
    let policy = app.get("/docs").await.header("content-security-policy").to_owned();
    assert!(policy.contains("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
    assert!(app.get("/docs/LICENSE").await.expect(200).text().contains("Apache License"));
}

#[tokio::test]
async fn without_the_reference_only_the_description_is_served() {
    let world = World::new().await;
    let app = world.app().role("api").env("POSTRIDER_HTTP__DOCS", "false").start().await;
    for path in ["/docs", "/docs/start.js", "/docs/swagger-ui-bundle.js"] {
        app.get(path).await.problem(404, "not_found");
    }
    assert_eq!(app.get("/").await.expect(200).json()["docs"], Value::Null);
    let html = app.request(Method::GET, "/", &[("accept", BROWSER)], "").await.expect(200).text();
    assert!(!html.contains("href=\"docs\""), "{html}");
    assert!(app.get("/openapi.json").await.expect(200).json()["paths"]["/docs"].is_null());
}
