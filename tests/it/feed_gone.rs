//! Deletions that an api process cannot note in Redis.

use std::time::Duration;

use crate::{
    feed::{cached, ids, page, shows},
    feed_writes::{delete, follow, post, unfollow},
    harness::{
        World,
        proxy::{Mode, Proxy},
        until,
        wait::seconds,
    },
};

/// The processor and the relay are away, so that nothing but the api processes can know what is
/// gone. One of them cannot reach Redis, while the other can.
#[tokio::test]
async fn what_was_deleted_or_unfollowed_without_redis_is_shown_by_no_process() {
    let world = World::new().await.with_postgres().await;
    let proxy = Proxy::start().await;
    proxy.lead_to(world.redis_url.rsplit('/').next().unwrap());
    let through = format!("redis://{}", proxy.address);
    let api = world.app().role("api").env("POSTRIDER_REDIS__URL", &through).start().await;
    let other = world.app().role("api").start().await;
    let (processor, relay) = (world.app().role("processor").start().await, world.app().role("relay").start().await);
    follow(&api, "bob", "ann").await;
    follow(&api, "bea", "ann").await;
    let (first, second) = (post(&api, "ann", "1").await, post(&api, "ann", "2").await);
    for user in ["bob", "bea"] {
        shows(&api, user, &[second, first]).await;
        for api in [&api, &other] {
            assert_eq!(cached(api, user).await, [second, first]);
        }
    }
    relay.stop().await;
    processor.stop().await;
    proxy.set(Mode::Down);
    delete(&api, &format!("/posts/{first}")).await.expect(200);
    assert_eq!(ids(&other, "bob", "limit=20").await, [second]);
    unfollow(&api, "bea", "ann").await;
    assert_eq!(ids(&other, "bea", "limit=20").await, [0; 0]);
    proxy.set(Mode::Pass);
    for _ in 0..100 {
        for api in [&api, &other] {
            assert_eq!((ids(api, "bob", "limit=20").await, ids(api, "bea", "limit=20").await), (vec![second], vec![]));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let processor = world.app().role("processor").start().await;
    until("the feed is in Redis again", seconds(20), || async {
        let (ids, hit, _) = page(&api, "bob", "limit=20").await?;
        assert_eq!(ids, [second]);
        hit.then_some(())
    })
    .await;
    processor.stop().await;
    api.stop().await;
    other.stop().await;
}
