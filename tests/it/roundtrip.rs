//! `postrider roundtrip`: the command that a cluster runs to check an installation end to end.

use std::process::Output;

use crate::harness::{App, World, stack::off_runtime};

pub async fn roundtrip(world: &World, app: &App, words: &[&str]) -> Output {
    let mut command = world.command();
    command.args(["roundtrip", "--url", &app.api]).args(words);
    off_runtime(move || command.output().unwrap()).await
}

#[tokio::test]
async fn the_roundtrip_passes_for_every_capability() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().env("POSTRIDER_GATEWAY__AUTO_CREATE_TOPICS", "true").start().await;
    let topic = world.topic("tried");
    let output = roundtrip(&world, &app, &["--topic", &topic]).await;
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{stdout}");
    for capability in ["kv", "gateway", "comments", "messages", "presence", "feed", "dlq"] {
        let line = stdout.lines().find(|line| line.starts_with(capability)).unwrap();
        assert!(line.contains("ok"), "{stdout}");
    }
    assert_eq!(world.kafka.read(&topic).await.len(), 1);
    app.stop().await;
}

#[tokio::test]
async fn a_capability_that_times_out_is_named_and_the_exit_code_is_1() {
    let world = World::new().await;
    // Without a processor, the push never reaches the view.
    let app = world.app().role("api").start().await;
    let output = roundtrip(&world, &app, &["--room", "kv", "--timeout", "2s"]).await;
    let (stdout, stderr) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(1), "{stdout}");
    assert!(stderr.contains("these capabilities failed: kv"), "{stderr}");
    assert!(stdout.contains("timed out after 2 s"), "{stdout}");
    let output = roundtrip(&world, &app, &["--room", "gateway"]).await;
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && stderr.contains("--room gateway needs --topic"), "{stderr}");
    app.stop().await;
}
