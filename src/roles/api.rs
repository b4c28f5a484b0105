//! The api role: every room's routes behind one listener.

use std::sync::Arc;

use axum::{Router, extract::State, routing::get};
use utoipa::openapi::{InfoBuilder, LicenseBuilder, OpenApi, OpenApiBuilder};
use utoipa_axum::router::OpenApiRouter;

use super::{
    runtime::{Platform, SharedRedis},
    settings::TopicPlan,
};
use crate::{
    gateway::{self, Gateway},
    kv::{self, Reader},
    platform::{
        drain::Tasks,
        http::{layer::OuterLayer, serve},
        ops::render_metrics,
    },
};

/// Builds the rooms and starts serving.
pub(super) async fn start(platform: &Arc<Platform>, redis: SharedRedis, tasks: &mut Tasks) -> Result<(), String> {
    let settings = &platform.settings;
    let gateway = Gateway::new(
        settings.gateway.clone(),
        settings.http.clone(),
        platform.producer.clone(),
        platform.broker.clone(),
        platform.admin.clone(),
        TopicPlan::internal_names(settings),
    );
    let kv = Reader::new(
        settings.kv.clone(),
        settings.http.clone(),
        &settings.kafka,
        &settings.redis,
        platform.producer.clone(),
        platform.topics_ready.clone(),
        redis,
    );
    let (router, openapi) = router(gateway, kv);
    let document: Arc<str> = openapi.to_pretty_json().map_err(|error| error.to_string())?.into();
    let router = router
        .route("/openapi.json", get(document_json).with_state(document))
        .route("/metrics", get(render_metrics).with_state(platform.metrics.clone()))
        .layer(OuterLayer::default());
    let listeners = serve::bind(&settings.http.listen).await.map_err(|error| error.to_string())?;
    for listener in &listeners {
        let address = listener.local_addr().map_err(|error| error.to_string())?;
        tracing::info!(%address, "serving HTTP");
    }
    let (config, stop, grace) = (settings.http.clone(), platform.stop.clone(), settings.drain.grace());
    tasks.spawn("http", async move {
        serve::serve(listeners, router, &config, stop, grace).await;
        Ok(())
    });
    Ok(())
}

fn router(gateway: Gateway, kv: Reader) -> (Router, OpenApi) {
    OpenApiRouter::with_openapi(openapi()).merge(kv::routes(kv)).merge(gateway::routes(gateway)).split_for_parts()
}

/// The head of the OpenAPI document.
pub fn openapi() -> OpenApi {
    let license = LicenseBuilder::new().name("Apache-2.0").identifier(Some("Apache-2.0")).build();
    let info = InfoBuilder::new()
        .title("postrider")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some("Events in over HTTP, kept in Kafka, carried to where they are wanted."))
        .license(Some(license))
        .build();
    OpenApiBuilder::new().info(info).build()
}

async fn document_json(State(document): State<Arc<str>>) -> ([(&'static str, &'static str); 1], String) {
    ([("content-type", "application/json")], document.to_string())
}
