//! Counts undelivered messages, and accepts acknowledgements from receivers without an open
//! connection.

use std::collections::HashMap;

use axum::{
    Json,
    extract::{Request, State},
    http::HeaderMap,
};
use postrider_http::{
    Code, Params, Problem, ProblemBody, RequestContext, body, context::require_content_type, decode, refusals::JsonBody,
};
use postrider_time::clock;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Messages,
    cursor::{Cursor, Malformed},
    model::{self, invalid, not_a_cursor, receiver_of_request},
    store,
};

/// Maximum count per receiver.
const MAX_COUNTED: i64 = 1_000;
/// Maximum number of receivers per request.
const MAX_RECEIVERS: usize = 100;

/// Returns these routes with their OpenAPI descriptions.
pub fn routes() -> OpenApiRouter<Messages> {
    OpenApiRouter::new().routes(routes!(unread)).routes(routes!(acknowledge))
}

/// Messages that a receiver is not known to have received.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = UnreadMessages)]
struct Unread {
    #[serde(rename = "receiverId")]
    receiver_id: String,
    /// Former name.
    #[schema(ignore)]
    #[serde(rename = "receiver_id")]
    former_receiver_id: String,
    /// Number of unread messages; at most 1,000.
    #[schema(minimum = 0, maximum = 1000)]
    unread: i64,
    /// True if there are more than that.
    more: bool,
    /// Time when Kafka received the oldest unread message, as RFC 3339; null if there is none.
    #[schema(required = true, format = DateTime)]
    oldest: Option<String>,
    /// Cursor of the last received message; messages after it are unread.
    cursor: String,
    /// Cursor of the newest message; acknowledging it marks all of these as read.
    last: String,
}

/// Unread messages of several receivers, in the order of the request.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = UnreadMessagesByReceiver)]
struct Several {
    receivers: Vec<Unread>,
}

/// Unread messages of one receiver, or of each one asked for.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
#[schema(as = UnreadMessagesResponse)]
enum Answer {
    One(Unread),
    Several(Several),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct UnreadQuery {
    #[serde(default)]
    receiver_id: Vec<String>,
}

/// Count unread messages
///
/// Counts messages that are not known to have arrived: by acknowledgement, by the pongs of plain
/// WebSockets, or by the `Last-Event-ID` of a stream. With several `receiverId` parameters the
/// response has one entry per receiver.
#[utoipa::path(
    get,
    path = "/api/v1/messages/unread",
    operation_id = "countUnreadMessages",
    tag = "messages",
    params(
        ("ReceiverId" = Option<String>, Header, nullable = false, description = "Id of the receiver; alternative to `receiverId`"),
        ("receiverId" = Option<Vec<String>>, Query, description = "Up to 100 receiver ids; the header takes precedence", max_items = 100),
    ),
    responses(
        (status = 200, description = "The count, or one count per receiver in `receivers`", body = Answer),
        (status = 400, description = "No receiver, or too many", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "An id is too long", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "Postgres cannot be reached", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn unread(
    State(messages): State<Messages>,
    context: RequestContext,
    headers: HeaderMap,
    Params(UnreadQuery { receiver_id: mut asked }): Params<UnreadQuery>,
) -> Result<Json<Answer>, Problem> {
    if asked.len() > MAX_RECEIVERS {
        let detail = format!("`receiverId` must be given at most {MAX_RECEIVERS} times (got {})", asked.len());
        return Err(invalid(detail).at_parameter("receiverId"));
    }
    if asked.len() < 2 {
        asked = vec![receiver_of_request(&headers, asked.pop())?];
    } else {
        let checked = asked.iter().try_for_each(|receiver| model::check_id("receiverId", receiver));
        checked.map_err(|flaw| flaw.problem().at_parameter("receiverId"))?;
    }
    asked.iter().try_for_each(|receiver| context.principal.may_act_for(receiver))?;
    let mut counted = messages.count(asked).await?;
    match counted.pop() {
        Some(only) if counted.is_empty() => Ok(Json(Answer::One(only))),
        last => {
            counted.extend(last);
            Ok(Json(Answer::Several(Several { receivers: counted })))
        }
    }
}

/// An acknowledgement.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Acknowledgement)]
struct Got {
    /// Id of the receiver.
    #[serde(default)]
    #[schema(min_length = 1, max_length = 255, required = true)]
    receiver_id: String,
    /// Cursor up to which everything has arrived.
    ack: String,
}

/// Acknowledge messages without an open connection
///
/// Stores that everything up to a cursor has arrived, as `{"ack":cursor}` does on a WebSocket. The
/// stored position never moves back, nor past the newest message. The response has the count of
/// unread messages after the acknowledgement.
#[utoipa::path(
    post,
    path = "/api/v1/messages/ack",
    operation_id = "acknowledgeMessages",
    tag = "messages",
    request_body = Got,
    responses(
        (status = 200, description = "Stored", body = Unread),
        (status = 400, description = "Malformed, or an invalid cursor", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "The id is too long", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "Postgres cannot be reached", body = ProblemBody, content_type = "application/problem+json"),
        JsonBody,
    ),
)]
async fn acknowledge(
    State(messages): State<Messages>,
    context: RequestContext,
    request: Request,
) -> Result<Json<Unread>, Problem> {
    require_content_type(request.headers(), &["application/json"])?;
    let body = body::read(request, messages.inner.http.limits()).await?;
    let Got { receiver_id, ack } = decode::object(&body)?;
    model::check_id("receiverId", &receiver_id)?;
    context.principal.may_act_for(&receiver_id)?;
    let malformed = |_: Malformed| not_a_cursor("ack", &ack).at_field("ack");
    let cursor: Cursor = ack.parse().map_err(malformed)?;
    let positions: Vec<_> =
        cursor.partitions().map(|(partition_id, offset)| (receiver_id.as_str(), partition_id, offset)).collect();
    messages.connections()?.hub.store.acknowledge(&positions).await.map_err(Problem::postgres_unavailable)?;
    let counted = messages.count(vec![receiver_id]).await?;
    counted.into_iter().next().map(Json).ok_or_else(|| Problem::new(Code::INTERNAL, "the count is missing"))
}

impl Messages {
    /// Counts the unread messages of each receiver, in order.
    async fn count(&self, receivers: Vec<String>) -> Result<Vec<Unread>, Problem> {
        let store = &self.connections()?.hub.store;
        // One more than the maximum shows whether there are more.
        let found = store.unread(&receivers, MAX_COUNTED + 1).await.map_err(Problem::postgres_unavailable)?;
        let mut partitions: HashMap<String, Vec<store::Unread>> = HashMap::new();
        for partition_id in found {
            partitions.entry(partition_id.receiver_id.clone()).or_default().push(partition_id);
        }
        let of = |receiver: String| sum(partitions.get(&receiver).map_or(&[], Vec::as_slice), receiver);
        Ok(receivers.into_iter().map(of).collect())
    }
}

/// Sums up the partitions of a receiver.
fn sum(partitions: &[store::Unread], receiver_id: String) -> Unread {
    let unread: i64 = partitions.iter().map(|partition_id| partition_id.unread).sum();
    let oldest = partitions.iter().filter_map(|partition_id| partition_id.oldest_ms).min().map(clock::rfc3339);
    let cursor: Cursor = partitions
        .iter()
        .filter_map(|partition_id| Some((partition_id.partition_id(), partition_id.delivered?)))
        .collect();
    let last: Cursor = partitions.iter().map(|partition_id| (partition_id.partition_id(), partition_id.last)).collect();
    Unread {
        former_receiver_id: receiver_id.clone(),
        receiver_id,
        unread: unread.min(MAX_COUNTED),
        more: unread > MAX_COUNTED,
        oldest,
        cursor: cursor.to_string(),
        last: last.to_string(),
    }
}
