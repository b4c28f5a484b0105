//! The command line: `produce`, `listen`, and what all commands have in common.

use std::{
    io::Write,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::harness::{
    App, Stack, World,
    proxy::{Mode, Proxy},
    stack::off_runtime,
    wait::{seconds, until},
};

/// Runs a command of this world to its end, with this text as its stdin.
async fn run(world: &World, words: &[&str], stdin: &str) -> Output {
    let mut command = world.command();
    command.args(words);
    run_with(command, stdin).await
}

async fn run_with(mut command: Command, stdin: &str) -> Output {
    let stdin = stdin.to_owned();
    off_runtime(move || {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    })
    .await
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Returns the lines of a command that succeeded, as JSON.
fn lines(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{}", err(output));
    out(output).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn produce_writes_arguments_and_lines_and_prints_their_positions() {
    let world = World::new().await;
    let topic = world.make_topic("made", 2).await;
    let app = world.app().role("api").start().await;
    let common = ["produce", &topic, "--api", &app.api, "--partition", "1"];
    let arguments = run(&world, &[&common[..], &["--key", "k", "--header", "a: b", "x y", "1e3"]].concat(), "").await;
    assert_eq!(out(&arguments), format!("{topic}/1@0\n{topic}/1@1\n"), "{}", err(&arguments));
    let values = run(&world, &common, "third\n\n{\"n\":  4}").await;
    assert_eq!(out(&values), format!("{topic}/1@2\n{topic}/1@3\n"), "{}", err(&values));
    let json = [&common[..], &["--format", "json", "--output", "json"]].concat();
    let json = lines(&run(&world, &json, "{\n\"n\": 5}[6]").await);
    assert_eq!(json[1], json!({"record": 2, "success": true, "topic": topic, "partition": 1, "offset": 5}));
    let ndjson = [&common[..], &["--format", "ndjson", "--key", "other"]].concat();
    let records = "{\"payload\":7,\"key\":\"own\"}\n{\"payload_base64\":\"AP8=\"}\n";
    assert!(run(&world, &ndjson, records).await.status.success());
    let stored = world.kafka.read(&topic).await;
    let values: Vec<&[u8]> = stored.iter().map(|record| record.value.as_deref().unwrap()).collect();
    let expected: [&[u8]; 8] = [b"x y", b"1e3", b"third", b"{\"n\":  4}", b"{\"n\":5}", b"[6]", b"7", &[0, 255]];
    assert_eq!(values, expected);
    let keys: Vec<&str> = stored.iter().map(|record| record.key()).collect();
    assert_eq!(keys, ["k", "k", "", "", "", "", "own", "other"]);
    assert_eq!(stored[0].header("a"), Some("b"));
    app.stop().await;
}

#[tokio::test]
async fn produce_names_the_record_that_is_not_stored_and_fails() {
    let world = World::new().await;
    let topic = world.make_topic("made", 1).await;
    let app = world.app().role("api").start().await;
    let words = ["produce", &topic, "--api", &app.api, "--format", "ndjson"];
    let some = run(&world, &words, "{\"payload\":1}\n{\"payload\":2,\"partition\":-1}\n{\"payload\":3}\n").await;
    assert_eq!((some.status.code(), out(&some)), (Some(1), format!("{topic}/0@0\n{topic}/0@1\n")));
    assert!(err(&some).contains("record 2 is not stored: ") && err(&some).contains("1 of 3 records"), "{}", err(&some));
    let unknown = run(&world, &["produce", &world.topic("nowhere"), "--api", &app.api, "x"], "").await;
    assert_eq!((unknown.status.code(), out(&unknown).as_str()), (Some(1), ""));
    assert!(err(&unknown).contains("unknown_topic"), "{}", err(&unknown));
    let broken = run(&world, &words, "{\"payload\":4}\n{\"payload\":").await;
    assert!(!broken.status.success() && err(&broken).contains("record 2 cannot be read"), "{}", err(&broken));
    let silent = run(&world, &["produce", &topic, "--api", "http://127.0.0.1:1", "x"], "").await;
    assert!(!silent.status.success() && err(&silent).contains("127.0.0.1:1"), "{}", err(&silent));
    app.stop().await;
}

#[tokio::test]
async fn produce_repeats_what_the_api_refuses_for_the_moment() {
    let stack = Stack::own("produce", &["--only", "kafka"]).await;
    let world = World::on(&stack).await;
    let topic = world.make_topic("made", 1).await;
    let app = world.app().role("api").start().await;
    // The topic's limits are known from now on.
    assert!(run(&world, &["produce", &topic, "--api", &app.api, "0"], "").await.status.success());
    stack.ctl(&["kill", "kafka"]).await;
    app.await_failing("kafka", seconds(30)).await;
    let impatient = run(&world, &["produce", &topic, "--api", &app.api, "--timeout", "500ms", "lost"], "").await;
    assert_eq!((impatient.status.code(), out(&impatient).as_str()), (Some(1), ""));
    assert!(err(&impatient).contains("record 1 is not stored: kafka_unavailable"), "{}", err(&impatient));
    let mut command = world.command();
    command.args(["produce", &topic, "--api", &app.api, "--timeout", "2m", "1", "2"]);
    let patient = tokio::spawn(async move { run_with(command, "").await });
    stack.ctl(&["start", "kafka"]).await;
    let stored = patient.await.unwrap();
    assert_eq!(out(&stored), format!("{topic}/0@1\n{topic}/0@2\n"), "{}", err(&stored));
    let values: Vec<String> = world.kafka.read(&topic).await.iter().map(|record| record.text().to_owned()).collect();
    assert_eq!(values, ["0", "1", "2"]);
    app.stop().await;
}

#[tokio::test]
async fn listen_topic_prints_the_records_from_a_position_on() {
    let world = World::new().await;
    let topic = world.make_topic("heard", 1).await;
    let values = [Some(b"{\"b\":1e3,\"a\":1}".to_vec()), Some(b"plain".to_vec()), Some(vec![255]), None];
    world.kafka.write(&topic, &values, &[("h", "v")]).await;
    let listen = ["listen", "topic", &topic, "--exit-at-end"];
    let all = run(&world, &[&listen[..], &["--from", "beginning"]].concat(), "").await;
    assert!(out(&all).contains(r#""value":{"b":1e3,"a":1}"#), "as written: {}", out(&all));
    let all = lines(&all);
    assert_eq!(all.len(), 4, "{all:?}");
    assert_eq!((&all[0]["offset"], &all[0]["headers"]), (&json!(0), &json!([{"name": "h", "value": "v"}])));
    assert_eq!((&all[1]["value_text"], &all[2]["value_base64"]), (&json!("plain"), &json!("/w==")));
    assert!(all[3].get("value").is_none(), "a tombstone: {}", all[3]);
    let offsets = |found: &[Value]| found.iter().map(|one| one["offset"].as_i64().unwrap()).collect::<Vec<_>>();
    for (from, expected) in [("2", vec![2, 3]), ("end", vec![]), ("1h", vec![0, 1, 2, 3])] {
        let found = lines(&run(&world, &[&listen[..], &["--from", from]].concat(), "").await);
        assert_eq!(offsets(&found), expected, "{from}");
    }
    let counted = lines(&run(&world, &["listen", "topic", &topic, "--from", "1", "--count", "2"], "").await);
    assert_eq!(offsets(&counted), [1, 2]);
    let missing = run(&world, &["listen", "topic", &world.topic("nowhere")], "").await;
    assert!(!missing.status.success() && err(&missing).contains("does not exist"), "{}", err(&missing));
}

async fn send(app: &App, receiver: &str, content: &str) {
    let message = json!({"chatId": "c", "senderId": "s", "receiverId": receiver, "content": content});
    assert_eq!(app.post_json("/api/v1/message/action", &message).await.status, 200);
}

#[tokio::test]
async fn listen_receiver_prints_each_message_once_also_across_disconnects() {
    let mut world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let proxy = Proxy::start().await;
    proxy.lead_to(app.api.trim_start_matches("http://"));
    world.set("API_URL", &format!("http://{}", proxy.address));
    send(&app, "bob", "1").await;
    let looked = lines(&run(&world, &["listen", "receiver", "bob", "--no-ack", "--count", "1"], "").await);
    assert_eq!(looked[0]["data"]["content"], "1", "{looked:?}");
    let mut command = world.command();
    command.args(["listen", "receiver", "bob", "--count", "3"]);
    let listening = tokio::spawn(async move { run_with(command, "").await });
    until("bob is connected", seconds(20), || async {
        let presence = app.get("/api/v1/presence/bob").await;
        (presence.status == 200 && presence.json()["connections"] == 1).then_some(())
    })
    .await;
    send(&app, "bob", "2").await;
    proxy.set(Mode::Down);
    send(&app, "bob", "3").await;
    proxy.set(Mode::Pass);
    let heard = lines(&listening.await.unwrap());
    let contents: Vec<&str> = heard.iter().map(|frame| frame["data"]["content"].as_str().unwrap()).collect();
    assert_eq!(contents, ["1", "2", "3"]);
    send(&app, "bob", "4").await;
    let next = lines(&run(&world, &["listen", "receiver", "bob", "--count", "1"], "").await);
    assert_eq!(next[0]["data"]["content"], "4", "the others were acknowledged");
    app.stop().await;
}

#[tokio::test]
async fn listen_comments_and_feed_print_what_is_new() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().start().await;
    let api = ["--api", &app.api];
    for text in ["a", "b"] {
        assert_eq!(app.post_json("/api/v1/comments", &json!({ "text": text })).await.status, 200);
    }
    let words = [&["listen", "comments", "--from", "beginning", "--count", "2"], &api[..]].concat();
    let comments = lines(&run(&world, &words, "").await);
    let mut texts: Vec<&str> = comments.iter().map(|event| event["data"]["text"].as_str().unwrap()).collect();
    texts.sort_unstable();
    assert_eq!(texts, ["a", "b"]);
    let id = comments[1]["id"].as_str().unwrap();
    assert_eq!(app.post_json("/api/v1/comments", &json!({"text": "c"})).await.status, 200);
    let next =
        lines(&run(&world, &[&["listen", "comments", "--after", id, "--count", "1"], &api[..]].concat(), "").await);
    assert_eq!(next[0]["data"]["text"], "c");
    let follow = json!({"follower_id": "bea", "followee_id": "ann"});
    assert_eq!(app.post_json("/follow", &follow).await.status, 200);
    for content in ["first", "second"] {
        assert_eq!(app.post_json("/posts", &json!({"author_id": "ann", "content": content})).await.status, 202);
    }
    let words = [&["listen", "feed", "bea", "--from", "beginning", "--interval", "100ms", "--count", "2"], &api[..]];
    let posts = lines(&run(&world, &words.concat(), "").await);
    let contents: Vec<&str> = posts.iter().map(|post| post["content"].as_str().unwrap()).collect();
    assert_eq!(contents, ["first", "second"]);
    app.stop().await;
}

#[tokio::test]
async fn listening_ends_after_its_time_with_exit_code_0() {
    let world = World::new().await.with_postgres().await;
    let topic = world.make_topic("heard", 1).await;
    let app = world.app().start().await;
    send(&app, "bob", "1").await;
    for words in [
        &["listen", "topic", &topic][..],
        &["listen", "receiver", "bob", "--no-ack", "--api", &app.api],
        &["listen", "comments", "--api", &app.api],
        &["listen", "feed", "bea", "--api", &app.api],
    ] {
        let began = Instant::now();
        let output = run(&world, &[words, &["--for", "700ms"]].concat(), "").await;
        assert!(output.status.success(), "{words:?}: {}", err(&output));
        assert!(began.elapsed() >= Duration::from_millis(700), "{words:?}");
    }
    app.stop().await;
}

#[tokio::test]
async fn listening_to_a_server_that_does_not_answer_fails_in_time() {
    let world = World::new().await;
    // The system accepts connections, and nobody answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let api = format!("http://{}", silent.local_addr().unwrap());
    let listen = async |words: &[&str]| run(&world, &[&["listen"][..], words, &["--api", &api]].concat(), "").await;
    let outputs = tokio::join!(listen(&["receiver", "bob"]), listen(&["comments"]), listen(&["feed", "bea"]));
    for output in [outputs.0, outputs.1, outputs.2] {
        assert_eq!(output.status.code(), Some(1), "{}", err(&output));
        assert!(err(&output).contains(" within 10 s"), "{}", err(&output));
    }
}

#[tokio::test]
async fn ctrl_c_ends_listening_with_exit_code_130() {
    let world = World::new().await;
    let topic = world.make_topic("heard", 1).await;
    let mut command = world.command();
    command.args(["listen", "topic", &topic]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = off_runtime(move || {
        use std::io::{BufRead, BufReader};
        let mut child = command.spawn().unwrap();
        let mut note = String::new();
        BufReader::new(child.stderr.take().unwrap()).read_line(&mut note).unwrap();
        assert!(note.contains("listening"), "{note}");
        let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        child.wait_with_output().unwrap()
    })
    .await;
    assert_eq!((output.status.code(), out(&output).as_str()), (Some(130), ""));
}

#[tokio::test]
async fn commands_that_need_kafka_name_its_address_and_the_setting_when_it_does_not_answer() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = silent.local_addr().unwrap().to_string();
    let mut world = World::new().await;
    let commands: [&[&str]; 5] = [
        &["dlq", "list"],
        &["lag"],
        &["listen", "topic", "t"],
        &["relay", "--topic", "t", "--target-url", "http://127.0.0.1:1", "--once"],
        &["relay", "--topic", "t", "--target-url", "http://127.0.0.1:1", "--dry-run"],
    ];
    for (brokers, reason) in
        [("127.0.0.1:1", "Connection refused"), ("nowhere.invalid:9092", "resolve"), (silent.as_str(), "")]
    {
        world.set("POSTRIDER_KAFKA__BROKERS", brokers);
        for words in commands {
            let output = run(&world, words, "").await;
            let error = err(&output);
            let expected =
                format!("Kafka does not answer at {brokers} (`kafka.brokers`, from POSTRIDER_KAFKA__BROKERS)");
            assert_eq!((output.status.code(), out(&output).as_str()), (Some(1), ""), "{words:?}: {error}");
            assert!(error.contains(&expected) && error.contains("within 3 s"), "{words:?}: {error}");
            assert!(error.contains(reason), "{words:?}: {error}");
            assert!(!error.contains("rdkafka"), "only one line: {error}");
        }
    }
    let waits = run(&world, &["dlq", "list", "--wait", "500ms"], "").await;
    assert!(err(&waits).contains("within 0.5 s"), "{}", err(&waits));
}

#[tokio::test]
async fn the_running_configuration_is_shown_with_sources_and_without_secrets() {
    let world = World::new().await;
    let app = world
        .app()
        .role("api")
        .env("POSTRIDER_KAFKA__SASL__PASSWORD", "hidden1")
        .env("POSTRIDER_POSTGRES__URL", "postgres://u:hidden2@127.0.0.1:1/x")
        .env("POSTRIDER_KAFKA__PROPERTIES", r#"{"ssl.key.password":"hidden3"}"#)
        .even_if_not_ready()
        .start()
        .await;
    // The command itself has another configuration than the process.
    let shown = run(&world, &["config", "show", "--running", "--management", &app.management], "").await;
    let text = out(&shown);
    assert!(shown.status.success(), "{}", err(&shown));
    assert!(text.contains("role: api  # --role\n"), "{text}");
    assert!(
        text.contains(&format!("kafka.topic_prefix: {}  # POSTRIDER_KAFKA__TOPIC_PREFIX\n", world.prefix)),
        "{text}"
    );
    assert!(text.contains("postgres.url: postgres://") && text.contains("# POSTRIDER_POSTGRES__URL"), "{text}");
    let raw = app.manage("/config").await.text();
    assert!(!text.contains("hidden") && !raw.contains("hidden"), "{text}{raw}");
    let nobody = run(&world, &["config", "show", "--running", "--management", "http://127.0.0.1:1"], "").await;
    assert!(!nobody.status.success() && err(&nobody).contains("--management"), "{}", err(&nobody));
    app.stop().await;
}

#[tokio::test]
async fn a_closed_pipe_ends_every_command_quietly() {
    let world = World::new().await;
    let topic = world.make_topic("heard", 1).await;
    world.kafka.write(&topic, &vec![Some(vec![b'x'; 1_000]); 2_000], &[]).await;
    let listen = format!("listen topic {topic} --from beginning");
    for words in ["config schema", "config show", "lag", "dlq list", "man", "completions zsh", "--help", &listen] {
        let mut command = Command::new("bash");
        let own = world.command();
        command.envs(own.get_envs().filter_map(|(name, value)| Some((name, value?))));
        // `head -c 0` closes the pipe before anything is written.
        let script = r#"set -o pipefail; "$0" $1 | head -c 0"#;
        command.args(["-c", script]).arg(own.get_program()).arg(words);
        let output = run_with(command, "").await;
        assert!(output.status.success(), "{words}: {:?} {}", output.status, err(&output));
        let error = err(&output);
        assert!(!error.contains("panicked") && !error.contains("pipe"), "{words}: {error}");
    }
}

#[tokio::test]
async fn completions_and_manual_pages_know_every_command() {
    let world = World::new().await;
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&world, &["completions", shell], "").await;
        assert!(out(&script).contains("roundtrip") && out(&script).contains("receiver"), "{shell}");
    }
    let mut command = Command::new("bash");
    let check = r#"source <("$0" completions bash) && complete -p postrider"#;
    command.args(["-c", check]).arg(world.command().get_program());
    let loaded = run_with(command, "").await;
    assert!(loaded.status.success() && out(&loaded).contains("_postrider"), "{}", err(&loaded));
    let folder = crate::harness::app::target_folder().join(format!("{}man", world.prefix));
    let written = run(&world, &["man", "--dir", folder.to_str().unwrap()], "").await;
    assert!(written.status.success(), "{}", err(&written));
    for page in ["postrider", "postrider-dlq-list", "postrider-listen-receiver"] {
        let text = std::fs::read_to_string(folder.join(format!("{page}.1"))).unwrap();
        assert!(text.contains(".SH SYNOPSIS"), "{page}");
    }
    std::fs::remove_dir_all(folder).unwrap();
    assert!(out(&run(&world, &["man"], "").await).contains(".TH postrider 1"));
}

#[tokio::test]
async fn lag_shows_groups_that_have_committed_and_names_those_that_need_postgres() {
    let world = World::new().await;
    let app = world.app().start().await;
    let lag = run(&world, &["lag", "--management", &app.management], "").await;
    let (shown, notes) = (out(&lag), err(&lag));
    assert!(lag.status.success() && shown.contains("postrider-kv"), "{shown}{notes}");
    let note = notes.lines().find(|line| line.starts_with("not shown: ")).unwrap_or_default();
    for group in ["postrider-comments", "client-response-group", "postrider-feed"] {
        assert!(note.contains(group) && note.contains("need Postgres") && !shown.contains(group), "{group}: {notes}");
    }
    app.stop().await;
    let mut whole = World::new().await.with_postgres().await;
    let app = whole.app().start().await;
    assert_eq!(app.post_json("/api/v1/comments", &json!({"text": "a"})).await.status, 200);
    whole.set("POSTRIDER_POSTGRES__URL", "");
    until("the comment is committed", seconds(20), || async {
        let lag = run(&whole, &["lag", "--management", &app.management], "").await;
        out(&lag).contains("postrider-comments").then_some(())
    })
    .await;
    app.stop().await;
}
