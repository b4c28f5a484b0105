//! The operator's view: probes, metrics and configuration.

use std::{collections::BTreeMap, fs, process::Output};

use serde_json::{Value, json};

use crate::{
    harness::{
        Stack, World,
        app::command,
        stack::off_runtime,
        wait::{seconds, until},
    },
    kv::{pull_after, push, running},
};

/// Runs the binary to its end, and returns success, stdout and stderr.
async fn run(args: &'static [&'static str], env: &[(&str, &str)]) -> (bool, String, String) {
    let env: BTreeMap<String, String> =
        env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let Output { status, stdout, stderr } = off_runtime(move || command(&env).args(args).output().unwrap()).await;
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (status.success(), text(stdout), text(stderr))
}

/// Writes a temporary file with this content and returns its path.
fn file(name: &str, content: &str) -> String {
    let path = std::env::temp_dir().join(format!("postrider-it-{}-{name}", std::process::id()));
    fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn probes_answer_in_every_role_and_name_each_check() {
    let world = World::new().await;
    for (role, checks) in [
        ("api", vec!["kafka", "redis", "redis memory", "start", "topic replication", "topics"]),
        ("processor", vec!["kafka", "kv view", "redis", "redis memory", "start", "topic replication", "topics"]),
        ("relay", vec!["kafka", "start", "topic replication", "topics"]),
        ("all", vec!["kafka", "kv view", "redis", "redis memory", "start", "topic replication", "topics"]),
    ] {
        let app = world.app().role(role).start().await;
        for path in ["/livez", "/readyz", "/startupz"] {
            let answer = app.manage(path).await;
            let report = app.manage("/readyz?verbose").await.text();
            assert_eq!((answer.status, answer.text()), (200, "ok".to_owned()), "{role} {path}: {report}");
        }
        let report = app.manage("/readyz?verbose").await.json();
        let names: Vec<&String> = report["checks"].as_object().unwrap().keys().collect();
        assert_eq!(names, checks, "{role}");
        assert!(report["checks"].as_object().unwrap().values().all(|check| check["status"] == "ok"), "{report}");
        assert_eq!(app.manage("/livez?verbose").await.json()["alive"], true, "{role}");
        assert_eq!(app.api.is_empty(), matches!(role, "processor" | "relay"));
        app.stop().await;
    }
}

#[tokio::test]
async fn the_local_stack_says_what_it_starts() {
    let stack = Stack::own("progress", &["--only", "redis"]).await;
    stack.ctl(&["stop", "redis"]).await;
    let messages = stack.messages_of(&["start", "redis"]).await;
    let lines: Vec<&str> = messages.lines().collect();
    assert!(lines[0] == "starting redis" && lines[1].starts_with("redis     responds on 127.0.0.1:"), "{messages}");
    let again = stack.messages_of(&["start", "redis"]).await;
    assert!(again.starts_with("redis     responds on"), "{again}");
}

#[tokio::test]
async fn the_management_port_explains_what_it_refuses() {
    let world = World::new().await;
    let app = world.app().role("relay").start().await;
    let problem = app.manage("/ready").await.problem(404, "not_found");
    assert_eq!(
        (&problem["detail"], &problem["instance"]),
        (&json!("there is no route /ready; did you mean `/readyz`?"), &json!("/ready"))
    );
    app.manage("/no/such/route").await.problem(404, "not_found");
    let client = reqwest::Client::new();
    let refused = client.post(format!("{}/livez", app.management)).send().await.unwrap();
    let (status, allow) = (refused.status().as_u16(), refused.headers()["allow"].clone());
    let problem: Value = serde_json::from_slice(&refused.bytes().await.unwrap()).unwrap();
    assert_eq!((status, &problem["code"]), (405, &json!("method_not_allowed")), "{problem}");
    assert!(allow.to_str().unwrap().contains("GET"), "{allow:?}");
    let answer = app.manage("/readyz?verbos").await;
    assert_eq!((answer.status, answer.text()), (200, "ok".to_owned()));
    assert_eq!(answer.header("postrider-warning"), "unknown parameter `verbos`; did you mean `verbose`?");
    assert!(!app.manage("/readyz?verbose&exclude=kafka").await.headers.contains_key("postrider-warning"));
    app.stop().await;
}

#[tokio::test]
async fn metrics_report_what_happened() {
    let world = World::new().await;
    let app = running(&world).await;
    let position = push(&app, "k", &json!(1)).await;
    pull_after(&app, "k", &position).await.expect(200);
    app.get("/pull/none").await.expect(404);
    app.get("/no/such/route/at/all").await.expect(404);
    let text = app.manage("/metrics").await.expect(200).text();
    for line in [
        r#"http_server_request_duration_seconds_count{http_request_method="POST",http_route="/push",http_response_status_code="202"} 1"#,
        r#"http_server_request_duration_seconds_bucket{http_request_method="POST",http_route="/push",http_response_status_code="202",le="10"} 1"#,
        r#"http_route="unmatched",http_response_status_code="404"} 1"#,
        "http_server_active_requests",
        r#"postrider_producer_records_total{client="producer",outcome="stored"}"#,
        "postrider_producer_delivery_duration_seconds_count",
        "postrider_kv_projected_records_total",
        r#"postrider_check_ok{check="kafka"} 1"#,
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
    assert!(!text.contains("/no/such/route"), "a path that a client made up became a label");
    for beginning in ["process_resident_memory_bytes", "process_open_fds", "postrider_consumer_batch_records_count"] {
        crate::harness::until(beginning, crate::harness::wait::seconds(10), || app.metric(beginning)).await;
    }
    assert!(app.get("/metrics").await.expect(200).text().contains("http_server_request_duration_seconds"));
    off_runtime(move || check_with_promtool(&text)).await;
}

/// Checks the names and the format with promtool, if it is installed.
fn check_with_promtool(text: &str) {
    use std::{
        io::Write,
        process::{Command, Stdio},
    };
    let mut tool = Command::new("promtool");
    tool.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let Ok(mut tool) = tool.spawn() else { return };
    tool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = tool.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    let broken = stderr.lines().any(|line| line.contains("error while linting"));
    assert!(!broken, "{stderr}");
}

#[tokio::test]
async fn the_role_comes_from_flag_environment_or_file() {
    let yaml = file("role.yaml", "role: relay\nkafka:\n  brokers: [one:1, two:2]\n");
    let role = |shown: &str| shown.lines().find(|line| line.starts_with("role:")).unwrap().to_owned();
    let (_, shown, _) = run(&["config", "show"], &[]).await;
    assert_eq!(role(&shown), "role: all  # default");
    let (_, shown, _) = run(&["config", "show"], &[("POSTRIDER_CONFIG", &yaml)]).await;
    assert!(role(&shown).starts_with("role: relay  # ") && role(&shown).contains("role.yaml"), "{shown}");
    assert!(shown.contains("kafka.brokers: one:1,two:2  # "), "{shown}");
    let env = [("POSTRIDER_CONFIG", yaml.as_str()), ("POSTRIDER_ROLE", "api")];
    let (_, shown, _) = run(&["config", "show"], &env).await;
    assert_eq!(role(&shown), "role: api  # POSTRIDER_ROLE");
    let (_, shown, _) = run(&["config", "show", "--set", "role=processor"], &env).await;
    assert_eq!(role(&shown), "role: processor  # --set");
    let (good, _, stderr) = run(&["run", "--role", "cook"], &[]).await;
    assert!(!good && ["api", "processor", "relay", "all"].iter().all(|role| stderr.contains(role)), "{stderr}");
    let (good, _, stderr) = run(&["config", "check"], &[("POSTRIDER_ROLE", "cook")]).await;
    assert!(!good && stderr.contains("POSTRIDER_ROLE") && stderr.contains("api, processor, relay, all"), "{stderr}");
}

#[tokio::test]
async fn a_configuration_error_names_the_key_its_source_and_the_nearest_key() {
    for (variable, value, words) in [
        ("POSTRIDER_KAFKA__BROKER", "x", vec!["POSTRIDER_KAFKA__BROKER", "`kafka.brokers`"]),
        ("POSTRIDER_HTTP__MAX_BODY_BYTES", "lots", vec!["POSTRIDER_HTTP__MAX_BODY_BYTES", "whole number"]),
        ("POSTRIDER_KV__AUDIT", "maybe", vec!["POSTRIDER_KV__AUDIT", "async, required, off"]),
        ("POSTRIDER_KV__PARTITIONS", "-1", vec!["POSTRIDER_KV__PARTITIONS", "a whole number between 1 and"]),
        ("POSTRIDER_HTTP__LISTEN", "abc", vec!["`http.listen` in POSTRIDER_HTTP__LISTEN", "`abc`", "`host:port`"]),
        ("POSTRIDER_KAFKA__BROKERS", "", vec!["`kafka.brokers` in POSTRIDER_KAFKA__BROKERS", "empty"]),
        ("POSTRIDER_REDIS__URL", "foo", vec!["`redis.url` in POSTRIDER_REDIS__URL", "redis://"]),
        ("POSTRIDER_POSTGRES__URL", "foo", vec!["`postgres.url` in POSTRIDER_POSTGRES__URL", "not a Postgres URL"]),
        ("POSTRIDER_TELEMETRY__OTLP__SAMPLE_RATIO", "5", vec!["SAMPLE_RATIO", "a number between 0 and 1"]),
        ("POSTRIDER_KAFKA__SASL__MECHANISM", "FOO", vec!["SASL__MECHANISM", "SCRAM-SHA-512, SCRAM-SHA-256, PLAIN"]),
        ("POSTRIDER_GATEWAY__RELAYS", r#"[{"name":"a"}]"#, vec!["`gateway.relays` in", "relay `a`", "topic"]),
        (
            "POSTRIDER_GATEWAY__RELAYS",
            r#"[{"name":"a","topic":"t","target_url":"notaurl"}]"#,
            vec!["`gateway.relays` in", "relay `a`", "`target_url`"],
        ),
        (
            "POSTRIDER_GATEWAY__RELAYS",
            r#"[{"name":"a","topic":"t","target_url":"http://x"},{"name":"a","topic":"u","target_url":"http://x"}]"#,
            vec!["`gateway.relays` in POSTRIDER_GATEWAY__RELAYS", "`a` is used twice"],
        ),
        ("POSTRIDER_CONFIG", "/no/such/file.yaml", vec!["/no/such/file.yaml"]),
    ] {
        for args in [&["config", "check"][..], &["run"]] {
            let (good, _, stderr) = run(args, &[(variable, value)]).await;
            assert!(!good, "{variable}");
            assert!(words.iter().all(|word| stderr.contains(word)), "{variable}: {stderr}");
            assert_eq!(stderr.lines().count(), 1, "not one sentence: {stderr}");
        }
    }
    let yaml = file("typo.yaml", "http:\n  listens: [a]\n");
    let (good, _, stderr) = run(&["config", "check"], &[("POSTRIDER_CONFIG", &yaml)]).await;
    assert!(!good && stderr.contains("typo.yaml") && stderr.contains("`http.listen`"), "{stderr}");
    let (good, stdout, _) = run(&["config", "check"], &[]).await;
    assert!(good && stdout.starts_with("valid"), "{stdout}");
}

#[tokio::test]
async fn secrets_are_read_from_files_and_never_shown() {
    let secret = file("secret", "redis://:hunter2@localhost:1\n");
    let env = [
        ("POSTRIDER_REDIS__URL_FILE", secret.as_str()),
        ("POSTRIDER_POSTGRES__URL", "postgres://u:hunter3@localhost/db"),
        ("POSTRIDER_KAFKA__SASL__PASSWORD", "hunter4"),
    ];
    let (good, shown, stderr) = run(&["config", "show"], &env).await;
    assert!(good, "{stderr}");
    for line in [
        "redis.url: redis://********@localhost:1",
        "postgres.url: postgres://********@localhost/db",
        "kafka.sasl.password: ********",
    ] {
        assert!(shown.contains(&format!("{line}  # ")), "{line}\n{shown}");
    }
    assert!(!format!("{shown}{stderr}").contains("hunter"), "{shown}{stderr}");
    let (good, _, stderr) = run(&["config", "show"], &[("POSTRIDER_REDIS__URL_FILE", "/no/such/secret")]).await;
    assert!(!good && stderr.contains("/no/such/secret"), "{stderr}");
}

/// Returns the variables of a process that can reach nothing but Kafka, with a credential in every
/// setting that can hold one.
fn credentials(topic: &str) -> Vec<(&'static str, String)> {
    let token = file("token", "Bearer hunter2\n");
    let relays = json!([{
        "name": "hook", "topic": topic, "target_url": "http://u:hunter2@127.0.0.1:1/hook/hunter2?token=hunter2", "retries": 0,
        "allow": ["127.0.0.0/8"], "headers": {"authorization": {"file": token}, "x-api-key": "hunter2"},
    }]);
    let text = |text: &str| text.to_owned();
    vec![
        ("POSTRIDER_REDIS__URL", text("redis://u:hunter2@127.0.0.1:1/0")),
        ("POSTRIDER_POSTGRES__URL", text("postgres://u:hunter2@127.0.0.1:1/d?pasword=hunter2&sslmode=disable")),
        ("POSTRIDER_TELEMETRY__OTLP__ENDPOINT", text("http://u:hunter2@127.0.0.1:1/in?token=hunter2")),
        ("POSTRIDER_TELEMETRY__OTLP__PROTOCOL", text("http")),
        ("POSTRIDER_TELEMETRY__OTLP__SAMPLE_RATIO", text("1.0")),
        ("POSTRIDER_TELEMETRY__OTLP__HEADERS__AUTHORIZATION", text("hunter2")),
        ("POSTRIDER_TELEMETRY__LOG_FILTER", text("debug")),
        ("POSTRIDER_KAFKA__PROPERTIES__SSL.KEY.PASSWORD", text("hunter2")),
        ("POSTRIDER_GATEWAY__RELAYS", relays.to_string()),
    ]
}

#[tokio::test]
async fn no_credential_appears_in_output_logs_answers_or_metrics() {
    let world = World::new().await;
    let topic = world.make_topic("orders", 1).await;
    let variables = credentials(&topic);
    let env: Vec<(&str, &str)> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let (good, shown, stderr) = run(&["config", "show"], &env).await;
    assert!(good && !format!("{shown}{stderr}").contains("hunter2"), "{shown}{stderr}");
    let app = env.iter().fold(world.app(), |app, (name, value)| app.env(name, value));
    let app = app.even_if_not_ready().start().await;
    app.post_json("/produce", &json!({"topic": topic, "payload": 1})).await.expect(200);
    until("the delivery is dead-lettered", seconds(30), || async {
        app.manage("/metrics").await.text().contains("postrider_dead_letters_total{").then_some(())
    })
    .await;
    let mut seen = String::new();
    for check in ["redis", "postgres"] {
        seen += &app.await_failing(check, seconds(20)).await;
    }
    for path in ["/pull/k", "/api/v1/comments?postId=p", "/admin/dlq"] {
        seen += &app.get(path).await.text();
    }
    for path in ["/readyz?verbose", "/metrics", "/consumers"] {
        seen += &app.manage(path).await.text();
    }
    let log = app.log_path().to_owned();
    app.stop().await;
    seen += &fs::read_to_string(log).unwrap();
    let leaks: Vec<&str> = seen.lines().filter(|line| line.contains("hunter2")).collect();
    assert!(leaks.is_empty(), "{}", leaks.join("\n"));
    assert!(seen.contains("http://127.0.0.1:1/********?token=********"), "the target is logged, without its secrets");
}

#[tokio::test]
async fn an_invalid_url_is_refused_without_showing_its_credentials() {
    for (name, url) in [
        ("POSTRIDER_POSTGRES__URL", "postgres://u:hunter2@h:port/d"),
        ("POSTRIDER_POSTGRES__URL", "postgres://u:p@h/d?sslmode=hunter2"),
        ("POSTRIDER_TELEMETRY__OTLP__ENDPOINT", "http://u:hunter2@no host/?token=hunter2"),
        ("POSTRIDER_GATEWAY__RELAYS", r#"[{"name":"a","topic":"t","target_url":"http://u:hunter2@h:port/"}]"#),
    ] {
        let (good, _, stderr) =
            run(&["run", "--role", "relay", "--set", "management.listen=127.0.0.1:0"], &[(name, url)]).await;
        assert!(!good && !stderr.contains("hunter2"), "{name}: {stderr}");
    }
}

#[tokio::test]
async fn the_schema_describes_every_section_and_help_lists_the_commands() {
    let (good, schema, _) = run(&["config", "schema"], &[]).await;
    let schema: Value = serde_json::from_str(&schema).unwrap();
    assert!(good);
    for section in ["role", "http", "kafka", "redis", "postgres", "kv", "gateway", "telemetry", "drain"] {
        assert!(schema["properties"][section].is_object(), "{section}");
    }
    let (good, help, _) = run(&["--help"], &[]).await;
    assert!(good && ["run", "migrate", "config", "Examples", "POSTRIDER_"].iter().all(|word| help.contains(word)));
    let (good, version, _) = run(&["--version"], &[]).await;
    assert!(good && version.contains(env!("CARGO_PKG_VERSION")), "{version}");
}

#[tokio::test]
async fn a_port_in_use_ends_the_process_with_an_error_that_names_the_address() {
    let world = World::new().await;
    let first = world.app().role("api").start().await;
    let taken = first.api.trim_start_matches("http://").to_owned();
    for (variable, setting) in
        [("POSTRIDER_HTTP__LISTEN", "http.listen"), ("POSTRIDER_MANAGEMENT__LISTEN", "management.listen")]
    {
        let (good, log, stderr) = run(
            &["run", "--role", "api"],
            &[
                ("POSTRIDER_KAFKA__BROKERS", &world.kafka.brokers),
                ("POSTRIDER_KAFKA__TOPIC_PREFIX", &world.prefix),
                ("POSTRIDER_REDIS__URL", &world.redis_url),
                ("POSTRIDER_HTTP__LISTEN", "127.0.0.1:0"),
                ("POSTRIDER_MANAGEMENT__LISTEN", "127.0.0.1:0"),
                (variable, &taken),
            ],
        )
        .await;
        let error =
            format!("postrider: cannot listen on {taken}: Address already in use (os error 98) (`{setting}`)\n");
        assert!(!good && stderr.ends_with(&error), "{variable}: {stderr}");
        let log = log + &stderr;
        let started = ["serving", "draining", "kafka", "redis"].iter().find(|word| log.contains(**word));
        assert_eq!(started, None, "nothing else has begun: {log}");
    }
}

#[tokio::test]
async fn migrations_can_run_twice_and_at_the_same_time() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    assert_eq!(app.failing("postgres").await, None);
    let again = (0..4).map(|_| world.migrate());
    futures_util::future::join_all(again).await;
    app.stop().await;
    let mut bare = World::new().await;
    bare.without_migration();
    let app = bare.app().even_if_not_ready().start().await;
    let detail = app.await_failing("postgres", crate::harness::wait::seconds(10)).await;
    let detail = if detail.contains("migrate") {
        detail
    } else {
        crate::harness::until("the check names the command", crate::harness::wait::seconds(10), || async {
            app.failing("postgres").await.filter(|detail| detail.contains("migrate"))
        })
        .await
    };
    assert!(detail.contains("postrider migrate"), "{detail}");
    bare.migrate().await;
    app.await_ready(crate::harness::wait::seconds(10)).await;
    app.stop().await;
}

#[tokio::test]
async fn the_idle_api_role_uses_little_memory_and_is_ready_quickly() {
    let world = World::new().await;
    world.app().role("api").start().await.stop().await;
    let app = world.app().role("api").start().await;
    let ready = app.await_log("ready", crate::harness::wait::seconds(5)).await;
    let after_ms = ready["after.ms"].as_u64().unwrap();
    assert!(after_ms < 3_000, "{after_ms} ms, even in a debug build on a busy machine");
    // The benches bound the release build; this bound only catches gross regressions.
    assert!(app.rss_kib() < 120 * 1024, "{} KiB", app.rss_kib());
    app.stop().await;
}
