//! HTTP route of presence.

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
};
use postrider_http::{Code, Problem, ProblemBody, params};
use postrider_time::clock;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{super::model, Answer, Presence, PresenceState};

/// Returns the route with its OpenAPI description. If presence is disabled, it responds with 404.
pub fn routes(presence: Option<Presence>) -> OpenApiRouter {
    OpenApiRouter::new().routes(routes!(presence_of)).with_state(presence)
}

/// State of a receiver.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = PresenceState)]
enum StateBody {
    Connected,
    Disconnected,
}

/// Presence of a receiver.
#[derive(Serialize, ToSchema)]
#[schema(as = Presence)]
#[serde(rename_all = "camelCase")]
struct Body {
    receiver_id: String,
    /// Former name.
    #[schema(ignore)]
    #[serde(rename = "receiver_id")]
    former_receiver_id: String,
    /// Connected to any process; also for `messages.presence.linger_ms` after the last connection.
    state: StateBody,
    /// Open connections and event streams across all processes.
    connections: i64,
    /// Time since which it is connected, as RFC 3339; null while it is not connected.
    #[schema(required = true, format = DateTime)]
    since: Option<String>,
    /// Time when it was last connected, as RFC 3339; null while it is connected, or if unknown.
    #[schema(required = true, format = DateTime)]
    last_seen: Option<String>,
    /// Former name.
    #[schema(ignore)]
    #[serde(rename = "last_seen")]
    former_last_seen: Option<String>,
}

impl Body {
    fn new(receiver_id: String, state: &PresenceState) -> Self {
        let PresenceState { connected, connections, since_ms, last_seen_ms } = *state;
        let state = if connected { StateBody::Connected } else { StateBody::Disconnected };
        let (since, last_seen) = (since_ms.map(clock::rfc3339), last_seen_ms.map(clock::rfc3339));
        let (former_receiver_id, former_last_seen) = (receiver_id.clone(), last_seen.clone());
        Self { receiver_id, former_receiver_id, state, connections, since, last_seen, former_last_seen }
    }
}

/// Read the presence of a receiver
///
/// Covers all processes. A receiver that has never connected is `disconnected`.
#[utoipa::path(
    get,
    path = "/api/v1/presence/{id}",
    operation_id = "getPresence",
    tag = "messages",
    params(("id" = String, Path, min_length = 1, description = "Id of the receiver, percent-encoded if needed")),
    responses(
        (status = 200, description = "The receiver's presence", body = Body),
        (status = 400, description = "Invalid id", body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "Presence is disabled", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "The id is too long", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "Redis cannot be reached, or has just lost data", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn presence_of(
    State(presence): State<Option<Presence>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Body>, Problem> {
    let id = params::from_path("id", id)?;
    model::check_id("id", &id).map_err(|flaw| flaw.problem().at_parameter("id"))?;
    let off = || Problem::new(Code::NOT_FOUND, "presence is disabled (`messages.presence.enabled` is false)");
    let presence = presence.ok_or_else(off)?;
    match presence.ask(&id).await {
        Ok(Answer::Known(state)) => Ok(Json(Body::new(id, &state))),
        Ok(Answer::Rebuilding) => {
            let detail = "presence is being rebuilt and this receiver may be connected; retry later";
            Err(Problem::new(Code::REBUILDING, detail))
        }
        Err(trouble) => Err(Problem::new(Code::REDIS_UNAVAILABLE, trouble.to_string())),
    }
}
