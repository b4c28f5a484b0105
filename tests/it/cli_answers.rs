//! Commands against an API that breaks connections, answers like a proxy, or is not there.

use std::{
    collections::BTreeMap,
    io::Write,
    process::{Output, Stdio},
};

use serde_json::json;

use crate::harness::{
    app::command,
    stack::off_runtime,
    target::{Act, Seen, Target},
};

/// Runs a command to its end. `reads` is false if nobody reads its stdout.
async fn run(words: &[&str], env: &[(&str, &str)], stdin: String, reads: bool) -> (Output, String) {
    let env: BTreeMap<_, _> = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let mut command = command(&env);
    command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = off_runtime(move || {
        let mut child = command.spawn().unwrap();
        if !reads {
            drop(child.stdout.take());
        }
        // A command that fails at once reads nothing.
        let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
        child.wait_with_output().unwrap()
    })
    .await;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    (output, error)
}

fn count(seen: &Seen) -> usize {
    seen.json()["records"].as_array().unwrap().len()
}

fn answer(status: u16, body: &serde_json::Value) -> Act {
    Act::Answer(status, "", body.to_string().leak())
}

fn stored(seen: &Seen) -> Act {
    let results: Vec<_> =
        (0..count(seen)).map(|at| json!({"success": true, "topic": "t", "partition": 0, "offset": at})).collect();
    answer(200, &json!({"success": true, "results": results}))
}

#[tokio::test]
async fn produce_sends_every_record_also_when_nobody_reads_its_output() {
    let target = Target::start().await;
    target.decide(stored);
    let lines: String = (0..20_000).map(|n| format!("{n}\n")).collect();
    let (output, error) = run(&["produce", "t", "--api", &target.url("")], &[], lines, false).await;
    assert!(output.status.success(), "{error}");
    assert_eq!(target.seen().iter().map(count).sum::<usize>(), 20_000);
}

#[tokio::test]
async fn a_record_that_may_be_stored_keeps_its_event_id_and_is_reported_as_such() {
    let target = Target::start().await;
    let results = json!({"success": false, "results": [
        {"success": true, "topic": "t", "partition": 0, "offset": 1},
        {"success": false, "code": "kafka_unavailable", "status": 503, "error": "no broker"},
    ]});
    // A proxy does not know what the API behind it has stored.
    target.script([Act::status(504), answer(207, &results)]);
    target.decide(stored);
    let (output, error) = run(&["produce", "t", "--api", &target.url(""), "1", "2"], &[], String::new(), true).await;
    let seen = target.seen();
    assert_eq!((output.status.code(), seen.len()), (Some(1), 2), "{error}");
    assert_eq!(seen[0].header("idempotency-key"), seen[1].header("idempotency-key"));
    assert!(error.contains("record 2 may be stored: kafka_unavailable"), "{error}");
    assert!(error.contains("1 of 2 records may be stored") && !error.contains("not stored"), "{error}");
}

#[tokio::test]
async fn produce_does_not_say_that_a_record_is_not_stored_when_it_may_be() {
    for act in [Act::Reset, Act::status(502), Act::Answer(500, "", "broken"), Act::Answer(200, "", "{}")] {
        let target = Target::start().await;
        target.decide(move |_| act.clone());
        let words = ["produce", "t", "--api", &target.url(""), "--timeout", "100ms", "x"];
        let (output, error) = run(&words, &[], String::new(), true).await;
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains("record 1 may be stored") && !error.contains("not s"), "{error}");
    }
    let problem = json!({"code": "topic_forbidden", "status": 403, "detail": "not allowed"});
    let target = Target::start().await;
    target.decide(move |_| answer(403, &problem));
    let lines: String = (0..2_000).map(|n| format!("{n}\n")).collect();
    let (_, error) = run(&["produce", "t", "--api", &target.url("")], &[], lines, true).await;
    assert!(error.contains("are not stored; the records after them were not sent"), "{error}");
}

#[tokio::test]
async fn wrong_addresses_headers_and_partitions_are_named_without_secrets() {
    let produce = |more: &[&'static str]| [&["produce", "t", "x"], more].concat();
    for (words, env, code, word) in [
        (produce(&["--api", "localhost:8080"]), ("", ""), 1, "`--api` must be a URL such as http://127.0.0.1:8080"),
        (produce(&["--partition", "-1"]), ("", ""), 2, "it must be the number of a partition, 0 or more"),
        (produce(&["--partition", "x"]), ("", ""), 2, "invalid value 'x' for '--partition"),
        (vec!["listen", "topic", "t", "--partition", "x"], ("", ""), 2, "it must be the number of a partition"),
        (vec!["listen", "comments", "--count", "0"], ("", ""), 2, "it must be a whole number, 1 or more"),
        (vec!["dlq", "list", "--limit", "none"], ("", ""), 2, "it must be a whole number, 1 or more"),
        (vec!["migrate"], ("", ""), 1, "`postgres.url` is not set; set it, or the variable POSTRIDER_POSTGRES__URL,"),
        (produce(&["--header", "hunter2"]), ("", ""), 2, "colon"),
        (vec!["config", "show", "--running"], ("MANAGEMENT_URL", "h:1"), 1, "`--management` must be a URL"),
    ] {
        let env = if env.0.is_empty() { vec![] } else { vec![env] };
        let (output, error) = run(&words, &env, String::new(), true).await;
        assert_eq!(output.status.code(), Some(code), "{words:?}: {error}");
        assert!(error.contains(word) && !error.contains("hunter2"), "{words:?}: {error}");
    }
    for address in ["", "http://127.0.0.1:1"] {
        let (output, error) = run(&["config", "show"], &[("MANAGEMENT_URL", address)], String::new(), true).await;
        assert!(output.status.success(), "{error}");
    }
}
