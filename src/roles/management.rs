//! Serves probes, metrics and the configuration at the management port.

use std::{
    io::{self, ErrorKind},
    sync::Arc,
    time::Duration,
};

use axum::{
    extract::{Request, State},
    middleware::{self, Next},
    response::Response,
};
use postrider_health as ops;
use postrider_http::{
    Audience, client_address::Proxies, layer::OuterLayer, origin::Origins, params, render, serve, shortcut::ShortCuts,
    unmatched::Routes,
};
use postrider_openapi::{self as openapi, NoInput};
use postrider_process::drain::{Draining, Ending, Tasks};
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use utoipa::{ToSchema, openapi::OpenApi};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    access,
    api::admin_routes,
    auth::Auth,
    error::Error,
    platform::{Mission, Platform},
};

/// Number of ports after a taken management port that the command `relay` tries.
const PORTS_TRIED: u16 = 100;

const ABOUT: &str = "Probes and metrics of a postrider process, for its supervisor and operators.";

/// Binds the management addresses. If the port is taken and was not configured, the command `relay`
/// uses the next free port, so that several commands can run on one machine.
pub(super) async fn bind(addresses: &[String], mission: &Mission) -> io::Result<Vec<TcpListener>> {
    let error = match serve::bind(addresses).await {
        Ok(listeners) => return Ok(listeners),
        Err(error) => error,
    };
    let any_port = matches!(mission, Mission::Relay(command) if command.any_management_port);
    if let (true, ErrorKind::AddrInUse, [address]) = (any_port, error.kind(), addresses)
        && let Some((host, port)) = address.rsplit_once(':')
        && let Ok(port) = port.parse::<u16>()
    {
        for next in port.saturating_add(1)..=port.saturating_add(PORTS_TRIED) {
            if let Ok(listeners) = serve::bind(&[format!("{host}:{next}")]).await {
                tracing::warn!(taken = port, port = next, "management port is taken, using the next free port");
                return Ok(listeners);
            }
        }
    }
    Err(error)
}

/// The server of the management port. It has its own stop, because it answers until the process
/// ends.
pub(super) struct Management {
    pub stop: CancellationToken,
    pub server: tokio::task::JoinHandle<()>,
}

/// A key of the configuration.
///
/// Describes what `postrider_config::Shown` is in JSON.
#[derive(ToSchema)]
#[schema(as = ConfigurationKey)]
#[expect(dead_code, reason = "only describes the answer")]
struct ShownKey {
    key: String,
    /// The value; a secret is masked.
    value: serde_json::Value,
    /// Where the value comes from: `default`, a file, a variable or a flag.
    source: String,
}

/// Show the configuration
///
/// Every key with its value and source. Secrets are masked.
#[utoipa::path(
    get,
    path = "/config",
    operation_id = "getConfiguration",
    tag = "management",
    responses(
        (status = 200, description = "The keys", body = Vec<ShownKey>, content_type = "application/json"),
        NoInput,
    ),
)]
async fn shown_settings(State(settings): State<Arc<str>>) -> ([(&'static str, &'static str); 1], String) {
    ([("content-type", "application/json")], settings.to_string())
}

/// Parameters of the probes.
#[derive(Deserialize)]
struct ProbeParams {
    #[serde(rename = "verbose")]
    _verbose: Option<String>,
}

/// Paths of the probes.
const PROBES: [&str; 3] = ["/livez", "/readyz", "/startupz"];

/// Notes parameters of probes that are nearly `verbose`. A probe is answered whatever its query is.
async fn warn_of_parameters(request: Request, next: Next) -> Response {
    if request.uri().query().is_some() && PROBES.contains(&request.uri().path()) {
        let _ = params::from_query::<ProbeParams>(request.uri().query());
    }
    next.run(request).await
}

/// Serves the management port; with `auth`, that of an api process, the routes of operators too.
pub(super) fn serve(
    platform: &Platform,
    listeners: Vec<TcpListener>,
    auth: Option<&Auth>,
    tasks: &mut Tasks,
) -> Result<Management, Error> {
    let config = platform.settings.http.clone();
    let head = OpenApiRouter::with_openapi(openapi::head("postrider management", ABOUT));
    let routes = head.merge(ops::routes(platform.health.clone(), platform.metrics.clone()));
    let own = OpenApiRouter::new().routes(routes!(shown_settings)).with_state(platform.shown_settings.clone());
    let mut described = routes.merge(own);
    if let (Some(auth), Some(callers_producer)) = (auth, &platform.callers_producer) {
        // Only these routes ask for credentials, and are counted among the requests of callers.
        let admin = admin_routes(platform, callers_producer, auth);
        described = described.merge(admin.layer(OuterLayer::new(auth.gate(access::ADMIN, Origins::default()))));
    }
    let rules = [access::MANAGEMENT, access::ADMIN].concat();
    access::check(described.get_openapi(), &rules)?;
    let paths = described.get_openapi().paths.paths.keys().map(String::as_str);
    let unmatched = Routes::new(paths.chain(["/openapi.json"]));
    let describe = |description: &mut OpenApi| auth.into_iter().for_each(|auth| auth.describe(description, &rules));
    let router = openapi::serve(described, false, describe)?
        .fallback(move |request: Request| std::future::ready(unmatched.answer(&request)))
        .layer(middleware::from_fn(warn_of_parameters))
        .layer(middleware::from_fn(render::plainly));
    let (stop, died) = (CancellationToken::new(), CancellationToken::new());
    tasks.watch("management port", died.clone());
    let guard = died.clone().drop_guard();
    let ending = Ending { draining: Draining::default(), died, stop: stop.clone(), grace: Duration::from_secs(1) };
    let server = tokio::spawn(async move {
        let _guard = guard;
        let listeners = serve::Listeners { bound: listeners, tls: None };
        serve::serve(Audience::Operators, listeners, router, ShortCuts::default(), &config, Proxies::default(), ending)
            .await;
    });
    Ok(Management { stop, server })
}
