//! The route of presence.

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{super::model, Answer, Presence, PresenceState};
use crate::platform::{
    clock,
    http::{Code, Problem, ProblemBody},
};

/// The route with its description. Without presence it says that it is off.
pub fn routes(presence: Option<Presence>) -> OpenApiRouter {
    OpenApiRouter::new().routes(routes!(presence_of)).with_state(presence)
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = PresenceState)]
enum StateBody {
    Connected,
    Disconnected,
}

/// Where a receiver stands.
#[derive(Serialize, ToSchema)]
#[schema(as = Presence)]
struct Body {
    receiver_id: String,
    /// Whether it is connected anywhere; for a moment (`messages.presence.linger_ms`) after its last connection, too.
    state: StateBody,
    /// Open connections and event streams, over all processes.
    connections: i64,
    /// While it is connected, since when, as RFC 3339; else null.
    since: Option<String>,
    /// While it is not connected, when it was, as RFC 3339; null where that is not known.
    last_seen: Option<String>,
}

impl Body {
    fn new(receiver_id: String, state: &PresenceState) -> Self {
        let PresenceState { connected, connections, since_ms, last_seen_ms } = *state;
        let state = if connected { StateBody::Connected } else { StateBody::Disconnected };
        let (since, last_seen) = (since_ms.map(clock::rfc3339), last_seen_ms.map(clock::rfc3339));
        Self { receiver_id, state, connections, since, last_seen }
    }
}

/// Whether a receiver is connected
///
/// Over all processes. Who has never been seen is `disconnected`.
#[utoipa::path(
    get,
    path = "/api/v1/presence/{id}",
    tag = "messages",
    params(("id" = String, Path, min_length = 1, description = "The receiver, percent-encoded where needed")),
    responses(
        (status = 200, description = "Where it stands", body = Body),
        (status = 400, description = "Not the id of a receiver", body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "Presence is not kept here", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "The id is too long", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "Redis cannot be reached, or has lost data a moment ago", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn presence_of(
    State(presence): State<Option<Presence>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Body>, Problem> {
    let Path(id) = id.map_err(|error| Problem::new(Code::InvalidRequest, error.body_text()))?;
    model::check_id("id", &id)?;
    let off = || Problem::new(Code::NotFound, "presence is not kept: `messages.presence.enabled` is false");
    let presence = presence.ok_or_else(off)?;
    match presence.ask(&id).await {
        Ok(Answer::Known(state)) => Ok(Json(Body::new(id, &state))),
        Ok(Answer::Rebuilding) => {
            let detail = "who is connected is being told again, and this receiver may be";
            Err(Problem::new(Code::Rebuilding, detail))
        }
        Err(trouble) => Err(Problem::new(Code::RedisUnavailable, trouble.to_string())),
    }
}
