//! The demands of each route on its callers, and the listeners of the routes of operators.

use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    auth::{BOOTSTRAP, get, locked_world, make, with},
    harness::{
        App, World,
        stack::off_runtime,
        tools::{Tools, chromium},
    },
};

/// The routes that a listener describes, with the scopes that each asks for; `None`: nothing at all.
fn routes(description: &Value) -> Vec<(Method, String, Option<Vec<Value>>)> {
    let mut routes = Vec::new();
    for (path, item) in description["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let Ok(method) = method.to_uppercase().parse::<Method>() else { continue };
            let scopes = operation["security"][0]["bearer"].as_array().cloned();
            routes.push((method, path.clone(), scopes));
        }
    }
    routes
}

/// Returns the path with a value for its parameter.
fn filled(path: &str) -> String {
    path.split('/').map(|part| if part.starts_with('{') { "1" } else { part }).collect::<Vec<_>>().join("/")
}

async fn ask(app: &App, base: &str, method: &Method, path: &str, key: Option<&str>) -> (u16, Value) {
    let mut request = app.client.request(method.clone(), format!("{base}{path}"));
    if let Some(key) = key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    let answer = request.header("content-type", "application/json").body("{}").send().await.unwrap();
    let status = answer.status().as_u16();
    (status, answer.json().await.unwrap_or(Value::Null))
}

#[tokio::test]
async fn every_route_asks_for_what_it_declares() {
    let mut world = locked_world().await;
    world.set("POSTRIDER_GATEWAY__SIMULATOR__ENABLED", "true");
    let app = world.app().start().await;
    let grant = json!({"scopes": ["webhooks"]});
    let made = with(&app, BOOTSTRAP, Method::POST, "/admin/keys", &grant).await.expect(201).json();
    let key = made["key"].as_str().unwrap();
    let public = ["/health", "/api/v1/websocket/health", "/openapi.json"];
    let operators = ["/", "/openapi.json", "/livez", "/readyz", "/startupz", "/metrics", "/consumers", "/config"];
    for (base, open) in [(&app.api, &public[..]), (&app.management, &operators)] {
        let description = app.client.get(format!("{base}/openapi.json")).send().await.unwrap().json().await.unwrap();
        let routes = routes(&description);
        assert!(routes.len() > 10, "{routes:?}");
        for (method, path, scopes) in routes {
            let target = filled(&path);
            let (without, problem) = ask(&app, base, &method, &target, None).await;
            let (lacking, named) = ask(&app, base, &method, &target, Some(key)).await;
            let Some(scopes) = scopes else {
                assert!(open.contains(&path.as_str()), "{method} {path} asks for nothing");
                assert!(without < 400 && lacking < 400, "{method} {path}: {without} {lacking}");
                continue;
            };
            assert_eq!((without, &problem["code"]), (401, &json!("unauthenticated")), "{method} {path}");
            match scopes.first() {
                None => assert!(![401, 403].contains(&lacking), "{method} {path}: {lacking} {named}"),
                Some(scope) => {
                    assert_eq!((lacking, &named["code"]), (403, &json!("forbidden")), "{method} {path}");
                    let needed = named["scope"].as_str().unwrap();
                    assert_eq!(needed.trim_end_matches(":PATTERN"), scope.as_str().unwrap(), "{method} {path}");
                }
            }
            let (_, problem) = ask(&app, base, &method, &target, Some(BOOTSTRAP)).await;
            assert!(
                !["unauthenticated", "forbidden"].contains(&problem["code"].as_str().unwrap_or_default()),
                "{path}"
            );
        }
        // Other paths and methods are no way around it.
        for (method, path) in [
            (Method::GET, "/nothing"),
            (Method::GET, "//pull/1"),
            (Method::GET, "/pull/1/"),
            (Method::GET, "/admin%2Fdlq"),
            (Method::GET, "/admin/../admin/dlq"),
            (Method::GET, "/%61dmin/dlq"),
            (Method::PATCH, "/push"),
            (Method::OPTIONS, "/push"),
            (Method::HEAD, "/pull/1"),
            (Method::TRACE, "/admin/dlq"),
        ] {
            let (status, _) = ask(&app, base, &method, path, None).await;
            // On the management port, only the routes of operators ask for credentials.
            let is_closed = status == 401 || (base == &app.management && [404, 405].contains(&status));
            assert!(is_closed, "{method} {path}: {status}");
        }
    }
    app.stop().await;
}

#[tokio::test]
async fn routes_of_operators_are_on_the_management_port_unless_they_are_exposed() {
    let mut world = World::new().await.with_postgres().await;
    for name in ["POSTRIDER_HTTP__EXPOSE_ADMIN", "POSTRIDER_HTTP__EXPOSE_METRICS"] {
        world.set(name, "false");
    }
    let app = world.app().role("api").start().await;
    for path in ["/admin/dlq", "/admin/keys", "/metrics"] {
        app.get(path).await.problem(404, "not_found");
        app.manage(path).await.expect(200);
    }
    app.manage("/nothing").await.problem(404, "not_found");
    let (status, _) = ask(&app, &app.management, &Method::DELETE, "/admin/keys/nothing", None).await;
    assert_eq!(status, 404);
    app.stop().await;
    let processor = world.app().role("processor").start().await;
    processor.manage("/admin/dlq").await.problem(404, "not_found");
    processor.stop().await;
}

#[tokio::test]
async fn without_authentication_clients_work_as_before_also_behind_a_gateway_that_adds_a_key() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().role("api").start().await;
    app.await_log(
        "authentication is off: whoever reaches this process may do everything (`auth.mode=required`)",
        crate::harness::wait::seconds(5),
    )
    .await;
    app.post_json("/push", &json!({"key": "a", "value": 1})).await.expect(202);
    // Whatever the header says, nobody asks for it.
    get(&app, "nonsense", "/api/v1/messages?receiverId=r").await.expect(200);
    app.stop().await;

    let world = locked_world().await;
    let app = world.app().role("api").start().await;
    app.post_json("/push", &json!({"key": "a", "value": 1})).await.problem(401, "unauthenticated");
    with(&app, BOOTSTRAP, Method::POST, "/push", &json!({"key": "a", "value": 1})).await.expect(202);
    app.stop().await;
}

/// Skipped where Chromium is not installed.
#[tokio::test]
async fn browsers_let_pages_of_allowed_origins_use_the_api_and_no_others() {
    let Some(browser) = chromium() else { return };
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let mut world = locked_world().await;
    world.set("POSTRIDER_HTTP__CORS__ORIGINS", &format!("http://localhost:{port}"));
    let app = world.app().start().await;
    let scopes = json!(["kv:read", "kv:write", "messages:read", "messages:write"]);
    let (_, key) = make(&app, json!({"scopes": scopes, "subject": "ann"})).await;
    let (tools, address) = (Tools::new(&world), app.api.clone());
    off_runtime(move || {
        Tools::expect(tools.node("cross_origin.mjs", &[browser, &address, &port], &[("API_KEY", &key)]));
    })
    .await;
    for key in ["form", "foreign"] {
        get(&app, BOOTSTRAP, &format!("/pull/{key}")).await.problem(404, "key_not_found");
    }
    app.stop().await;
}

#[tokio::test]
async fn without_origins_writes_of_other_pages_are_refused_also_without_authentication() {
    let world = World::new().await;
    let app = world.app().role("api").start().await;
    let write = async |origin: &str| {
        let headers = [("origin", origin), ("content-type", "application/json")];
        app.request(Method::POST, "/push", &headers, r#"{"key":"a","value":1}"#).await
    };
    let refused = write("https://page.example").await.problem(403, "origin_forbidden");
    assert_eq!(refused["errors"][0]["header"], "Origin");
    write("null").await.problem(403, "origin_forbidden");
    write(&app.api).await.expect(202);
    let read = app.request(Method::GET, "/health", &[("origin", "https://page.example")], "").await.expect(200);
    assert_eq!(read.header("access-control-allow-origin"), "");
    app.stop().await;
}
