//! The api role: serves the routes of every capability.

use std::sync::Arc;

use axum::{extract::Request, middleware::from_fn_with_state};
use postrider_auth as auth_routes;
use postrider_comments::{self as comments, Comments};
use postrider_dlq::{self as dlq, Queue};
use postrider_feed::{self as feed, Feed};
use postrider_gateway::{self as gateway, Gateway};
use postrider_health::metrics_routes;
use postrider_http::{
    Audience, client_address::Proxies, escapes::EscapesLayer, layer::OuterLayer, origin::Origins, serve,
    shortcut::ShortCuts, tls::Tls, unmatched::Routes,
};
use postrider_kafka::CallersProducer;
use postrider_kv::{self as kv, Service};
use postrider_messages::{self as messages, Messages, Presence};
use postrider_openapi as openapi;
use postrider_process::drain::Tasks;
use postrider_rate_limit::Limiter;
use postrider_redis as redis;
use tokio::net::TcpListener;
use utoipa_axum::router::OpenApiRouter;

use super::{
    access,
    auth::Auth,
    error::Error,
    platform::{Platform, SharedRedis},
    settings::{Settings, TopicPlan},
};

const ABOUT: &str = "Accepts events over HTTP, stores them in Kafka and delivers them.";

/// Builds the capabilities and starts serving HTTP.
pub(super) fn start(
    platform: &Arc<Platform>,
    callers_producer: CallersProducer,
    listeners: Vec<TcpListener>,
    redis: SharedRedis,
    auth: &Auth,
    tasks: &mut Tasks,
) -> Result<(), Error> {
    let settings = &platform.settings;
    let gateway = Gateway::new(
        settings.gateway.clone(),
        settings.http.clone(),
        callers_producer.clone(),
        platform.broker.clone(),
        platform.admin.clone(),
        TopicPlan::internal_names(settings),
    );
    let (kv, kv_background) = Service::new(
        settings.kv.clone(),
        settings.http.clone(),
        &settings.kafka,
        &settings.redis,
        platform.producer.clone(),
        platform.topics_ready.clone(),
        redis.clone(),
    );
    tasks.spawn("kv reads and audit", kv_background.run(platform.stop.clone(), settings.drain.grace()));
    let ids = kv.ids();
    tasks.spawn_forever("kv ids", async move { ids.watch().await });
    let feed = feed(platform, redis.clone(), tasks);
    let rules = [access::API, access::ADMIN].concat();
    let origins = Origins::new(&settings.http.cors)?;
    let gate = auth.gate(&rules, origins.clone());
    let short_cuts = kv::short_cuts(
        gateway::short_cuts(ShortCuts::new(gate.clone()).off_if(settings.limits.is_on()), &gateway),
        &kv,
    );
    let short_cuts = feed::short_cuts(short_cuts, &feed);
    let presence = presence(platform, redis.clone());
    let (comments, messages) = (comments(platform, tasks), messages(platform, presence.clone(), tasks));
    let mut routes = vec![
        kv::routes(kv),
        gateway::routes(gateway),
        comments::routes(comments),
        messages::routes(messages),
        messages::presence_routes(presence),
        feed::routes(feed),
        auth_routes::ticket_routes(auth.tickets.clone()),
    ];
    if settings.http.expose_metrics {
        routes.push(metrics_routes(platform.metrics.clone()));
    }
    if settings.http.expose_admin {
        routes.push(admin_routes(platform, &callers_producer, auth));
    }
    let head = OpenApiRouter::with_openapi(openapi::head("postrider", ABOUT));
    let described = routes.into_iter().fold(head, OpenApiRouter::merge);
    access::check(described.get_openapi(), &rules)?;
    let pages = ["/openapi.json"].into_iter().chain(settings.http.docs.then_some("/docs"));
    let paths = described.get_openapi().paths.paths.keys().map(String::as_str);
    let unmatched = Routes::new(paths.chain(pages));
    let router = openapi::serve(described, settings.http.docs, |description| auth.describe(description, &rules))?;
    let router =
        router.fallback(move |request: Request| std::future::ready(unmatched.answer(&request))).layer(EscapesLayer);
    let router = match settings.limits.is_on() {
        true => router.layer(from_fn_with_state(limiter(settings, redis), postrider_rate_limit::limit)),
        false => router,
    };
    let router = router.layer(OuterLayer::new(gate));
    let router = origins.layer().into_iter().fold(router, |router, layer| router.layer(layer));
    let proxies = Proxies::new(&settings.http)?;
    for listener in &listeners {
        let address = listener.local_addr().map_err(Error::Listener)?;
        tracing::info!(%address, "serving HTTP");
    }
    let tls = Tls::open(&settings.http.tls)?;
    if let Some(tls) = tls.clone() {
        tasks.spawn_forever("certificate", tls.follow());
    }
    let listeners = serve::Listeners { bound: listeners, tls };
    let (config, ending) = (settings.http.clone(), platform.ending());
    tasks.watch("http listeners", ending.died.clone());
    tasks.spawn_infallible("http", async move {
        serve::serve(Audience::Callers, listeners, router, short_cuts, &config, proxies, ending).await;
    });
    Ok(())
}

/// Builds the limits per caller. What needs no credential is not limited either.
fn limiter(settings: &Settings, redis: SharedRedis) -> Arc<Limiter> {
    let free = access::public().collect();
    Arc::new(Limiter::new(settings.limits.clone(), redis, &settings.redis.key_prefix, free))
}

/// Builds the routes of operators.
pub(super) fn admin_routes(platform: &Platform, callers_producer: &CallersProducer, auth: &Auth) -> OpenApiRouter {
    let settings = &platform.settings;
    let dlq =
        Queue::new(settings.kafka.clone(), callers_producer.alone(), platform.broker.clone(), platform.admin.clone());
    let dlq = dlq::routes(dlq, &settings.dlq, &settings.http);
    dlq.merge(auth_routes::key_routes(auth.keys.clone(), settings.http.limits()))
}

/// Builds the comments capability and starts the tasks that follow its table.
fn comments(platform: &Platform, tasks: &mut Tasks) -> Comments {
    let settings = &platform.settings;
    let comments = Comments::new(
        settings.comments.clone(),
        settings.http.clone(),
        &settings.kafka,
        platform.producer.clone(),
        platform.topics_ready.clone(),
        platform.postgres.clone(),
        platform.stop.clone(),
    );
    if let Some(tail) = comments.tail() {
        tasks.spawn_forever("comments tail", tail.clone().run());
        let channel = comments::hint_channel(&settings.redis.key_prefix);
        tasks.spawn_forever(
            "comments notifications",
            redis::listen(settings.redis.clone(), channel, move || tail.wake()),
        );
    }
    comments
}

fn presence(platform: &Platform, redis: SharedRedis) -> Option<Presence> {
    let settings = &platform.settings;
    Presence::new(
        &settings.messages.presence,
        &settings.redis.key_prefix,
        &settings.kafka,
        platform.producer.clone(),
        platform.topics_ready.clone(),
        redis,
    )
}

/// Builds the messages capability and starts the tasks that serve its open connections.
fn messages(platform: &Platform, presence: Option<Presence>, tasks: &mut Tasks) -> Messages {
    let settings = &platform.settings;
    let messages = Messages::new(
        settings.messages.clone(),
        settings.http.clone(),
        &settings.kafka,
        platform.producer.clone(),
        platform.topics_ready.clone(),
        messages::connections(
            &settings.messages,
            &settings.redis.key_prefix,
            platform.postgres.clone(),
            presence,
            platform.stop.clone(),
        ),
    );
    if let Some(open) = messages.open() {
        let channels = open.hub.channels();
        tasks.spawn_forever("messages notifications", channels.run(settings.redis.clone(), open.hub.clone()));
        tasks.spawn_forever("messages sweep", open.hub.clone().sweep_forever());
        tasks.spawn_forever("messages positions", open.hub.clone().answer_forever());
        tasks.spawn_forever("messages receivers", open.receivers.clone().watch());
        tasks.spawn_forever("messages clock", open.hub.clone().tick_forever());
        tasks.spawn_infallible("messages connections", open.clone().run(settings.drain.grace()));
    }
    messages
}

/// Builds the feed capability and starts the task that batches its reads and writes.
fn feed(platform: &Platform, redis: SharedRedis, tasks: &mut Tasks) -> Feed {
    let settings = &platform.settings;
    let storage = platform.postgres.clone().map(|pool| feed::Storage { pool, backlog: platform.backlog.clone() });
    let (feed, background) = Feed::new(settings.feed.clone(), settings.http.clone(), storage, &settings.redis, redis);
    if let Some(background) = background {
        tasks.spawn("feed reads and writes", background.run(platform.stop.clone(), settings.drain.grace()));
    }
    feed
}
