//! HTTP routes of messages.

use axum::{
    body::Body,
    extract::{
        Request, State,
        ws::{WebSocketUpgrade, rejection::WebSocketUpgradeRejection},
    },
    http::{HeaderMap, HeaderName, Response},
    response::IntoResponse,
};
use postrider_http::{
    Bounded, Code, Params, Problem, ProblemBody, RequestContext, body,
    context::{require_content_type, single},
    json,
    refusals::{JsonWrite, PostgresRead},
    sse,
};
use postrider_kafka::{Outgoing, event::Event, partition_of};
use postrider_openapi::{NoInput, tagged};
use postrider_time::clock;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Messages, Open,
    cursor::{Cursor, Malformed},
    follower::Follower,
    model::{self, Draft, invalid, not_a_cursor, receiver_of_request},
    socket::{Connection, PROTOCOL},
    store::Limits,
    stream, unread,
};

const ROUTE: &str = "/api/v1/message/action";
/// Key of every record, for compatibility with existing consumers.
const KEY: &[u8] = b"message.new";
const DEFAULT_LIMIT: u64 = 20;
const MAX_LIMIT: u64 = 100;
/// Maximum total size of the messages in one page of history, in bytes.
const PAGE_BYTES: usize = 4 << 20;
/// Size of a socket's read and write buffers in bytes. Small, because every connection has its own.
const SOCKET_BUFFER_BYTES: usize = 2 << 10;
static LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// Returns the routes of messages with their OpenAPI descriptions.
pub fn routes(messages: Messages) -> OpenApiRouter {
    let text = "Messages to receivers by WebSocket, server-sent events and history, and the presence of receivers.";
    OpenApiRouter::with_openapi(tagged("messages", text))
        .routes(routes!(push))
        .routes(routes!(health))
        .routes(routes!(connect))
        .routes(routes!(live))
        .routes(routes!(history))
        .merge(unread::routes())
        .with_state(messages)
}

/// Send a message
///
/// Responds once Kafka has stored the message on all in-sync replicas. The message reaches every
/// open connection of its receiver within milliseconds. Without an open connection it is delivered
/// on the next one.
#[utoipa::path(
    post,
    path = "/api/v1/message/action",
    operation_id = "sendMessage",
    tag = "messages",
    params(("Idempotency-Key" = Option<String>, Header, nullable = false, min_length = 1, max_length = 255, description = "Makes a retry write the same message")),
    request_body = Draft,
    responses(
        (status = 200, description = "`Message Sent`", body = String, content_type = "text/plain", example = "Message Sent"),
        (status = 400, description = "Malformed, or a field is missing or empty", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "An id is too long", body = ProblemBody, content_type = "application/problem+json"),
        JsonWrite,
    ),
)]
async fn push(
    State(messages): State<Messages>,
    context: RequestContext,
    request: Request,
) -> Result<&'static str, Problem> {
    messages.push(&context, request).await.map(|()| "Message Sent")
}

/// Report that WebSockets are served
#[utoipa::path(
    get,
    path = "/api/v1/websocket/health",
    operation_id = "getWebSocketHealth",
    tag = "messages",
    responses(
        (status = 200, description = "`WebSocket Route Operational`", body = String, content_type = "text/plain", example = "WebSocket Route Operational"),
        NoInput,
    ),
)]
async fn health() -> &'static str {
    "WebSocket Route Operational"
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ConnectQuery {
    receiver_id: Option<String>,
    after: Option<String>,
}

/// Receive messages by WebSocket
///
/// Each message is one text frame: the record's value as it was produced. Messages sent while the
/// receiver was not connected are delivered first. With the subprotocol `postrider.v1`, frames are
/// `{"id":cursor,"type":"message","data":{…}}` and `{"type":"gap"}`, and the client may send
/// `{"ack":cursor}`.
#[utoipa::path(
    get,
    path = "/api/v1/websocket/message",
    operation_id = "openMessageWebSocket",
    tag = "messages",
    params(
        ("ReceiverId" = Option<String>, Header, nullable = false, description = "Id of the receiver; alternative to `receiverId`"),
        ("receiverId" = Option<String>, Query, description = "For clients that cannot set headers; the header takes precedence"),
        ("after" = Option<String>, Query, description = "Continue after this cursor"),
    ),
    responses(
        (status = 101, description = "Connected"),
        (status = 400, description = "Missing receiver, or not a WebSocket handshake", body = ProblemBody, content_type = "application/problem+json"),
        (status = 403, description = "Origin not allowed", body = ProblemBody, content_type = "application/problem+json"),
        (status = 429, description = "Too many connections of this receiver or address", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "Too many connections, or Postgres cannot be reached", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "No connection was opened", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn connect(
    State(messages): State<Messages>,
    context: RequestContext,
    headers: HeaderMap,
    Params(query): Params<ConnectQuery>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response<Body>, Problem> {
    let receiver = receiver_of_request(&headers, query.receiver_id)?;
    context.principal.may_act_for(&receiver)?;
    let upgrade = upgrade.map_err(|error| invalid(error.body_text()))?;
    let after = cursor_parameter("after", query.after.as_deref())?;
    let Open { hub, acks, .. } = messages.connections()?.clone();
    let follower = Follower::open(&hub, &receiver, context.client, after).await?;
    let max_bytes = messages.inner.config.max_incoming_bytes;
    let upgrade = upgrade
        .read_buffer_size(SOCKET_BUFFER_BYTES)
        .write_buffer_size(SOCKET_BUFFER_BYTES)
        .max_message_size(max_bytes)
        .max_frame_size(max_bytes)
        .protocols([PROTOCOL]);
    let cursors = upgrade.selected_protocol().is_some();
    let open = hub.open.token();
    Ok(upgrade.on_upgrade(move |socket| async move {
        Connection::new(follower, acks, cursors, context.principal).run(socket).await;
        drop(open);
    }))
}

/// Receive messages as server-sent events
///
/// Delivers the same messages as the WebSocket: `data` is the message, `id` the cursor after it. An
/// event `gap` means that messages after the client's position have been deleted.
#[utoipa::path(
    get,
    path = "/api/v1/messages/stream",
    operation_id = "streamMessages",
    tag = "messages",
    params(
        ("ReceiverId" = Option<String>, Header, nullable = false, description = "Id of the receiver; alternative to `receiverId`"),
        ("receiverId" = Option<String>, Query, description = "For clients that cannot set headers; the header takes precedence"),
        ("Last-Event-ID" = Option<String>, Header, nullable = false, description = "Continue after this `id`"),
        ("after" = Option<String>, Query, description = "The same; the header wins"),
    ),
    responses(
        (status = 200, description = "The stream", body = sse::Described, content_type = "text/event-stream"),
        (status = 400, description = "Missing receiver, or an invalid id", body = ProblemBody, content_type = "application/problem+json"),
        (status = 403, description = "Origin not allowed", body = ProblemBody, content_type = "application/problem+json"),
        (status = 429, description = "Too many connections of this receiver or address", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "Too many streams, or Postgres cannot be reached", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn live(
    State(messages): State<Messages>,
    context: RequestContext,
    headers: HeaderMap,
    Params(query): Params<ConnectQuery>,
) -> Result<Response<Body>, Problem> {
    let receiver = receiver_of_request(&headers, query.receiver_id)?;
    context.principal.may_act_for(&receiver)?;
    let header = single(&headers, &LAST_EVENT_ID, "Last-Event-ID")?.map(|value| value.to_str().unwrap_or("?"));
    let header = header.filter(|id| !id.is_empty());
    let after = match header {
        Some(id) => cursor("Last-Event-ID", Some(id)).map_err(|problem| problem.at_header("Last-Event-ID"))?,
        None => cursor_parameter("after", query.after.as_deref())?,
    };
    let open = messages.connections()?;
    let age = sse::age(messages.inner.config.stream_max_age_ms);
    let follower = Follower::open(&open.hub, &receiver, context.client, after).await?;
    if header.is_some() {
        // The client of a stream sends only this id, which proves that it has everything up to it.
        open.acks.add(&follower.subscription.receiver, &follower.cursor);
    }
    Ok(stream::respond(follower, age, context.principal))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct HistoryQuery {
    receiver_id: Option<String>,
    after: Option<String>,
    /// Name of `after` in other lists.
    cursor: Option<String>,
    limit: Option<Bounded<1, MAX_LIMIT>>,
}

/// A message in a page.
#[derive(Serialize, ToSchema)]
#[schema(as = StoredMessage)]
#[serde(rename_all = "camelCase")]
struct Listed<'a> {
    /// Cursor after the message.
    id: String,
    /// Value of the record.
    #[schema(value_type = Object)]
    data: &'a RawValue,
    /// Time when Kafka received the message, as RFC 3339.
    #[schema(format = DateTime)]
    created_at: String,
    /// Former name.
    #[schema(ignore)]
    #[serde(rename = "created_at")]
    former_created_at: String,
    /// True if the receiver is known to have the message.
    delivered: bool,
}

/// A page of messages.
#[derive(Serialize, ToSchema)]
#[schema(as = MessagePage)]
#[serde(rename_all = "camelCase")]
struct Page<'a> {
    /// Messages, oldest first.
    messages: Vec<Listed<'a>>,
    /// Cursor for the next page; null on the last one.
    #[schema(required = true)]
    next_cursor: Option<String>,
    /// Former name.
    #[schema(ignore)]
    #[serde(rename = "next_cursor")]
    former_next_cursor: Option<String>,
    /// True if messages between `after` and the first one have been deleted.
    gap: bool,
}

/// List a receiver's messages, oldest first
#[utoipa::path(
    get,
    path = "/api/v1/messages",
    operation_id = "listMessages",
    tag = "messages",
    params(
        ("ReceiverId" = Option<String>, Header, nullable = false, description = "Id of the receiver; alternative to `receiverId`"),
        ("receiverId" = Option<String>, Query, description = "The same; the header wins"),
        ("after" = Option<String>, Query, description = "`nextCursor` of the previous page, or the `id` of a message; `cursor` is another name of it"),
        ("limit" = Option<u16>, Query, minimum = 1, maximum = 100, description = "Maximum number of messages per page (default 20)"),
    ),
    responses(
        (status = 200, description = "A page", body = Page),
        (status = 422, description = "The limit is out of range, or the id is too long", body = ProblemBody, content_type = "application/problem+json"),
        PostgresRead,
    ),
)]
async fn history(
    State(messages): State<Messages>,
    context: RequestContext,
    headers: HeaderMap,
    Params(query): Params<HistoryQuery>,
) -> Result<Response<Body>, Problem> {
    let receiver = receiver_of_request(&headers, query.receiver_id)?;
    context.principal.may_act_for(&receiver)?;
    let limit = query.limit.map_or(DEFAULT_LIMIT, Bounded::get) as u16;
    let after = match (&query.after, &query.cursor) {
        (Some(_), Some(_)) => {
            return Err(invalid("`cursor` is another name of `after`; send one of them").at_parameter("cursor"));
        }
        (None, Some(cursor)) => cursor_parameter("cursor", Some(cursor))?,
        (after, None) => cursor_parameter("after", after.as_deref())?,
    };
    let mut cursor = after.unwrap_or_default();
    let store = &messages.connections()?.hub.store;
    let limits = Limits { rows: limit, bytes: PAGE_BYTES };
    let found = store.after(&receiver, &cursor, limits).await.map_err(Problem::postgres_unavailable)?;
    let mut positions = store.positions(&[&receiver]).await.map_err(Problem::postgres_unavailable)?;
    let delivered = positions.remove(&receiver).unwrap_or_default().delivered;
    let (mut listed, mut gap, mut last) = (Vec::new(), false, Cursor::default());
    for row in &found {
        last.advance(row.partition_id(), row.last);
        if row.value.is_some() && listed.len() >= usize::from(limit) {
            continue;
        }
        gap |= row.is_after_gap(cursor.seen(row.partition_id()), true);
        if row.is_forgotten() {
            cursor.forget(row.partition_id());
        }
        let Some(value) = row.value.as_deref() else { continue };
        let offset = row.offset.unwrap_or(row.last);
        cursor.advance(row.partition_id(), offset);
        let delivered = offset <= delivered.seen(row.partition_id());
        let data = serde_json::from_str(value).map_err(|error| Problem::new(Code::INTERNAL, error.to_string()))?;
        let created_at = clock::rfc3339(row.created_ms.unwrap_or_default());
        listed.push(Listed {
            id: cursor.to_string(),
            data,
            former_created_at: created_at.clone(),
            created_at,
            delivered,
        });
    }
    let more = last.partitions().any(|(partition_id, last)| cursor.seen(partition_id) < last) && !listed.is_empty();
    let next_cursor = more.then(|| cursor.to_string());
    let page = Page { messages: listed, former_next_cursor: next_cursor.clone(), next_cursor, gap };
    Ok(axum::Json(page).into_response())
}

impl Messages {
    async fn push(&self, context: &RequestContext, request: Request) -> Result<(), Problem> {
        let inner = &*self.inner;
        require_content_type(request.headers(), &["application/json"])?;
        let body = body::read(request, inner.http.limits()).await?;
        let model::Checked { sender_id, receiver_id: receiver, text } = model::check(&body)?;
        context.principal.may_act_for(&sender_id)?;
        if !inner.topics_ready.get() {
            let detail =
                "the topics are not ready: they were not checked yet, or are not as they must be (see readiness)";
            return Err(Problem::new(Code::KAFKA_UNAVAILABLE, detail));
        }
        if let Some(open) = self.open() {
            open.receivers.admit(&receiver).await?;
        }
        let value = json::minify(&text);
        let id = context.event_id(ROUTE, None, &[&body])?;
        let event = Event { id, kind: "postrider.message.sent", source: "/messages", trace: context.trace };
        let record = Outgoing {
            topic: &inner.topic,
            // All records share a key, so the receiver determines the partition; its messages have
            // one order.
            partition: Some(partition_of(receiver.as_bytes(), inner.config.partitions)),
            key: Some(KEY),
            payload: Some(value.as_bytes()),
            headers: Some(event.headers(0)),
            ..Outgoing::default()
        };
        inner.producer.store(record).await?;
        Ok(())
    }

    pub(super) fn connections(&self) -> Result<&Open, Problem> {
        let off =
            || Problem::new(Code::POSTGRES_UNAVAILABLE, "messages are disabled because `postgres.url` is not set");
        self.open().ok_or_else(off)
    }
}

/// Parses a cursor, which may be empty. The error has no place.
fn cursor(name: &str, text: Option<&str>) -> Result<Option<Cursor>, Problem> {
    let parse = |text: &str| text.parse().map_err(|_: Malformed| not_a_cursor(name, text));
    text.filter(|text| !text.is_empty()).map(parse).transpose()
}

fn cursor_parameter(name: &str, text: Option<&str>) -> Result<Option<Cursor>, Problem> {
    cursor(name, text).map_err(|problem| problem.at_parameter(name))
}
