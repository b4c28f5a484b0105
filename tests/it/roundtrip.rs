//! `postrider roundtrip`: what a cluster runs against an installation to see that it works.

use std::process::Output;

use crate::harness::{App, World, stack::off_runtime};

pub async fn roundtrip(world: &World, app: &App, words: &[&str]) -> Output {
    let mut command = world.command();
    command.args(["roundtrip", "--url", &app.api]).args(words);
    off_runtime(move || command.output().unwrap()).await
}

#[tokio::test]
async fn something_goes_through_every_room_and_comes_out_again() {
    let world = World::new().await.with_postgres().await;
    let app = world.app().env("POSTRIDER_GATEWAY__AUTO_CREATE_TOPICS", "true").start().await;
    let topic = world.topic("tried");
    let output = roundtrip(&world, &app, &["--topic", &topic]).await;
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}");
    for room in ["kv", "gateway", "comments", "messages", "presence", "feed", "dlq"] {
        let line = said.lines().find(|line| line.starts_with(room)).unwrap();
        assert!(line.contains("ok"), "{said}");
    }
    assert_eq!(world.kafka.read(&topic).await.len(), 1);
    app.stop().await;
}

#[tokio::test]
async fn a_room_that_nothing_comes_out_of_is_named_and_the_exit_code_is_1() {
    let world = World::new().await;
    // Nobody carries the push into the view.
    let app = world.app().role("api").start().await;
    let output = roundtrip(&world, &app, &["--room", "kv", "--room", "gateway", "--timeout", "2"]).await;
    let (said, error) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(error.contains("these capabilities failed: kv"), "{error}");
    assert!(said.contains("timed out after 2 s") && said.contains("gateway   skipped"), "{said}");
    app.stop().await;
}
