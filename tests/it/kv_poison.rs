//! Records in the key-value topic that were not written by a push.

use std::{
    io::Write,
    process::{Command, Stdio},
};

use crate::{
    harness::{World, stack::off_runtime},
    kv::{pull_after, push, running},
};

/// Writes a record with arbitrary bytes, which well-behaved clients cannot.
async fn write_raw(world: &World, key: &str, headers: &[&[u8]], value: &str) {
    use std::os::unix::ffi::OsStrExt;
    let topic = world.topic("messages");
    let mut command = Command::new("kcat");
    command.args(["-P", "-b", &world.kafka.brokers, "-t", &topic, "-p", "0", "-k", key]);
    for header in headers {
        command.arg("-H").arg(std::ffi::OsStr::from_bytes(header));
    }
    let value = value.to_owned();
    off_runtime(move || {
        let mut child = command.stdin(Stdio::piped()).spawn().expect("kcat, which dev/setup --test installs");
        child.stdin.take().unwrap().write_all(value.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());
    })
    .await;
}

#[tokio::test]
async fn invalid_records_are_dead_lettered_once_and_block_nothing() {
    let mut world = World::new().await;
    world.set("POSTRIDER_KV__PARTITIONS", "1");
    let app = running(&world).await;
    write_raw(&world, "", &[], "1").await;
    write_raw(&world, "k", &[], "{not json").await;
    write_raw(&world, "odd", &[b"\xff\xfe=x", b"fine=y"], "\"kept\"").await;
    let position = push(&app, "k", &"after".into()).await;
    assert_eq!(pull_after(&app, "k", &position).await.json()["value"], "after");
    assert_eq!(pull_after(&app, "odd", &position).await.json()["value"], "kept");
    let letters = world.kafka.read_at_least(&world.topic("dead-letter-events"), 2).await;
    let mut found: Vec<_> =
        letters.iter().map(|letter| (letter.header("original-offset"), letter.header("error-class"))).collect();
    found.sort_unstable();
    assert_eq!(found, [(Some("0"), Some("no_key")), (Some("1"), Some("not_json"))]);
    app.stop().await;
    // A new view is built from the whole topic; records that were dead-lettered before are not
    // dead-lettered again.
    world.set("POSTRIDER_REDIS__KEY_PREFIX", &format!("{}anew:", world.prefix));
    let app = running(&world).await;
    assert_eq!(pull_after(&app, "k", &position).await.json()["value"], "after");
    assert_eq!(world.kafka.read(&world.topic("dead-letter-events")).await.len(), 2);
    app.stop().await;
}
