//! The content of dead letters, and how many there are of a record.

use postrider_dlq::EVENTS_TOPIC;
use rdkafka::message::{Header, OwnedHeaders};

use crate::dlq::{NOW_MS, Post, message, outcomes};

#[tokio::test]
async fn each_group_has_its_own_letter_and_a_repeated_letter_replaces_the_first() {
    let post = Post::new().await;
    let topic = post.world.make_topic("orders", 1).await;
    let record = post.produce(&topic, 0, Some(b"k"), Some(b"v")).await;
    for group in ["one", "two", "one"] {
        post.give_up(EVENTS_TOPIC, &record, group, "transport", NOW_MS).await;
    }
    let mut listed = post.listed(&[]).await;
    listed.sort();
    assert_eq!(listed, [format!("{topic}/0@0 one"), format!("{topic}/0@0 two")]);
    // The record is written back once, because every group reads it.
    assert_eq!(outcomes(&post.change(&["replay", "--yes"]).await), ["replayed", "replayed"]);
    assert_eq!(post.records(&topic).await.len(), 2);
    assert_eq!(post.listed(&[]).await, [""; 0]);
}

#[tokio::test]
async fn a_record_at_the_limit_is_stored_whole_and_a_larger_one_without_its_value() {
    let post = Post::new().await;
    let topic = post.world.make_topic("orders", 1).await;
    let noise = |bytes: usize| (0..bytes).map(|_| fastrand::u8(..)).collect::<Vec<u8>>();
    let (whole, large) = (noise(1_040_000), noise(3 << 20));
    let headers = || OwnedHeaders::new().insert(Header { key: "tenant", value: Some("acme") });
    let whole = message(&topic, 0, 0, Some(b"whole"), Some(&whole), headers());
    let large = message(&topic, 0, 1, Some(b"large"), Some(&large), headers());
    let huge_header = OwnedHeaders::new().insert(Header { key: "huge", value: Some(&noise(3 << 20)) });
    let huge = message(&topic, 0, 2, Some(b"huge"), Some(b"v"), huge_header);
    let mut ids = Vec::new();
    for record in [&whole, &large, &huge] {
        ids.push(post.give_up(EVENTS_TOPIC, record, "kv", "transport", NOW_MS).await);
    }
    let letters = post.records(&post.world.topic(EVENTS_TOPIC)).await;
    let letter = |id: &str| letters.iter().find(|letter| letter.key() == id).unwrap();
    assert_eq!(letter(&ids[0]).value.as_ref().map(Vec::len), Some(1_040_000));
    assert_eq!(letter(&ids[1]).header("value-omitted"), Some("3145728"));
    assert_eq!((letter(&ids[1]).text(), letter(&ids[1]).header("tenant")), ("", Some("acme")));
    assert_eq!((letter(&ids[2]).header("huge"), letter(&ids[2]).header("headers-omitted")), (None, Some("true")));
    assert_eq!(outcomes(&post.change(&["replay", "--yes"]).await), ["replayed", "incomplete", "incomplete"]);
    assert_eq!(post.records(&topic).await.len(), 1);
}
