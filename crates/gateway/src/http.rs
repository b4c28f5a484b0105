//! HTTP routes of the gateway.

use std::{
    borrow::Cow,
    time::{Duration, Instant, SystemTime},
};

use axum::{
    body::Body,
    extract::{RawQuery, Request, State},
    http::{Method, Response},
    response::IntoResponse,
};
use futures_util::future::join_all;
use postrider_http::{
    Code, Problem, ProblemBody, RequestContext, body,
    context::{digest, require_content_type},
    decode::{self, Decoded},
    params,
    shortcut::ShortCuts,
    warning::{self, NearMiss},
};
use postrider_identity::{Denied, Permission};
use postrider_kafka::{Receipt, SendError, Stored, event::Event};
use postrider_openapi::{NoInput, tagged};
use rdkafka::error::RDKafkaErrorCode;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json, value::RawValue};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Gateway,
    answer::{BatchAnswer, ProduceAnswer, RecordStream, json_response, part_result, produced},
    described::ProduceRequest,
    model::{ACCEPTED, JSON, Record, RecordNumber, check_topic},
    simulator, stream,
};

/// Event type of records that callers produce.
const EVENT_TYPE: &str = "postrider.gateway.record";
const ROUTE: &str = "/produce";
/// Interval at which a record of a batch or stream retries while the producer's queue is full.
const QUEUE_RETRY: Duration = Duration::from_millis(2);

/// Returns the gateway's routes with their OpenAPI descriptions.
pub fn routes(gateway: Gateway) -> OpenApiRouter {
    let simulate = gateway.inner.config.simulator.enabled;
    let head = tagged("gateway", "Records in your own Kafka topics.");
    let router =
        OpenApiRouter::with_openapi(head).routes(routes!(produce)).routes(routes!(health)).with_state(gateway.clone());
    if simulate { router.merge(simulator::routes(&gateway)) } else { router }
}

/// Adds a short cut for single records, the most frequent request.
pub fn short_cuts(short_cuts: ShortCuts, gateway: &Gateway) -> ShortCuts {
    let gateway = gateway.clone();
    short_cuts.with(Method::POST, ROUTE, move |request: Request, context| {
        let query = request.uri().query().map(str::to_owned);
        produce(State(gateway.clone()), RawQuery(query), context, request)
    })
}

/// Produce one record, a batch or a stream
///
/// A JSON body is one record, or a batch in `records`. An `application/x-ndjson` or
/// `application/jsonl` body is a stream of records, one per line. The response has one line per
/// record, in order, and begins while the request is still being sent.
#[utoipa::path(
    post,
    path = "/produce",
    operation_id = "produceRecords",
    tag = "gateway",
    params(
        ("topic" = Option<String>, Query, description = "Topic of records that name none"),
        ("Idempotency-Key" = Option<String>, Header, nullable = false, description = "Makes a retry write the same event; 1 to 255 bytes"),
    ),
    request_body(
        description = "One record or a batch as JSON, or a stream with one `ProduceRecord` per line",
        content((ProduceRequest = "application/json"), (inline(RecordStream) = "application/x-ndjson")),
    ),
    responses(
        (status = 200, description = "Stored on all in-sync replicas; for a batch, every record; for a stream, one `RecordResult` per line", content((ProduceAnswer = "application/json"), (String = "application/x-ndjson"))),
        (status = 207, description = "A batch of which some records failed", body = BatchAnswer),
        (status = 400, description = "Malformed", body = ProblemBody, content_type = "application/problem+json"),
        (status = 403, description = "Topic not allowed", body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "Unknown topic", body = ProblemBody, content_type = "application/problem+json"),
        (status = 408, description = "Body too slow", body = ProblemBody, content_type = "application/problem+json"),
        (status = 413, description = "Too large", body = ProblemBody, content_type = "application/problem+json"),
        (status = 415, description = "Neither JSON nor NDJSON", body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, description = "The timestamp is one that the topic deletes, or looks like seconds", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "Refused, or outcome unknown", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn produce(
    State(gateway): State<Gateway>,
    RawQuery(query): RawQuery,
    context: RequestContext,
    request: Request,
) -> Response<Body> {
    match gateway.produce(query.as_deref(), &context, request).await {
        Ok(response) => response,
        Err(problem) => failure(problem).into_response(),
    }
}

/// Adds the members `success` and `error`, which older clients read.
pub(super) fn failure(problem: Problem) -> Problem {
    let error = problem.detail.clone();
    problem.with("success", false).with("error", error)
}

/// Parameters of the query.
#[derive(Deserialize)]
struct ProduceParams {
    topic: Option<String>,
}

/// Returns the value of `?topic=`. A query that is a legal topic name and nothing else needs no
/// decoding.
fn default_topic(query: Option<&str>) -> Result<Option<Cow<'_, str>>, Problem> {
    let Some(query) = query else { return Ok(None) };
    if let Some(topic) = query.strip_prefix("topic=").filter(|topic| check_topic(topic).is_ok()) {
        return Ok(Some(topic.into()));
    }
    let ProduceParams { topic } = params::from_query(Some(query))?;
    let Some(topic) = topic.filter(|topic| !topic.is_empty()) else { return Ok(None) };
    check_topic(&topic).map_err(|problem| problem.at_parameter("topic"))?;
    Ok(Some(topic.into()))
}

/// A record that the producer has accepted.
pub(super) struct Taken {
    topic: String,
    receipt: Receipt,
}

/// A record of a batch or stream, accepted or not.
pub(super) struct Part {
    taken: Result<Taken, Problem>,
    near_misses: Vec<NearMiss>,
}

impl From<Problem> for Part {
    fn from(problem: Problem) -> Self {
        Self { taken: Err(problem), near_misses: Vec::new() }
    }
}

impl Gateway {
    async fn produce(
        &self,
        query: Option<&str>,
        context: &RequestContext,
        request: Request,
    ) -> Result<Response<Body>, Problem> {
        context.check_idempotency_key()?;
        let topic = default_topic(query)?;
        let content_type = require_content_type(request.headers(), &ACCEPTED)?;
        if content_type != JSON {
            return stream::respond(self.clone(), topic.map(Cow::into_owned), context.clone(), content_type, request);
        }
        let body = body::read(request, self.inner.http.limits()).await?;
        let mut record = decode::noted(Record::parse(&body, "body"))?.value;
        if let Some(records) = record.records.take() {
            let topic = record.topic.as_deref().or(topic.as_deref());
            return self.produce_batch(&records, &body, topic, context).await;
        }
        let taken = self.hand_over(record, &body, topic.as_deref(), context, RecordNumber::Alone).await?;
        let (topic, stored) = self.settle(taken).await?;
        Ok(json_response(200, produced(&topic, stored)))
    }

    /// Checks one record and passes it to the producer. A record of a batch or stream waits for
    /// space in the producer's queue; later records wait behind it, so that they keep their order.
    /// `content` distinguishes requests that reuse an idempotency key.
    async fn hand_over(
        &self,
        record: Record<'_>,
        content: &[u8],
        default_topic: Option<&str>,
        context: &RequestContext,
        number: RecordNumber,
    ) -> Result<Taken, Problem> {
        let checked = record.check(default_topic)?;
        let topic = checked.topic.clone().into_owned();
        if context.principal.has_ended(SystemTime::now()) {
            // A stream may be open for longer than its credential is accepted.
            return Err(Denied::Expired.into());
        }
        context.principal.may_on(Permission::TopicWrite, &topic)?;
        self.inner.topics.permit(&topic)?;
        let limits = self.inner.topics.limits(&topic).await?;
        let (part, until) = match number {
            RecordNumber::Alone => (None, Instant::now()),
            RecordNumber::Part(part, until) => (Some(part), until),
        };
        let id = context.event_id(ROUTE, part, &[topic.as_bytes(), content])?;
        let event = Event { id, kind: EVENT_TYPE, source: "/gateway", trace: context.trace };
        checked.fits(&limits, &event)?;
        let producer = &self.inner.producer;
        loop {
            let waits = part.is_some() && Instant::now() < until;
            if waits && !producer.has_room(checked.bytes()) {
                tokio::time::sleep(QUEUE_RETRY).await;
                continue;
            }
            match producer.send(checked.outgoing(&event), &limits) {
                Ok(receipt) => return Ok(Taken { topic, receipt }),
                Err(SendError::Full) if waits => tokio::time::sleep(QUEUE_RETRY).await,
                Err(error) => return Err(self.explain(&error, &topic)),
            }
        }
    }

    /// Waits until the broker acknowledges the record.
    async fn settle(&self, taken: Taken) -> Result<(String, Stored), Problem> {
        match taken.receipt.stored(&taken.topic).await {
            Ok(stored) => Ok((taken.topic, stored)),
            Err(error) => Err(self.explain(&error, &taken.topic)),
        }
    }

    async fn produce_batch(
        &self,
        records: &[&RawValue],
        body: &[u8],
        topic: Option<&str>,
        context: &RequestContext,
    ) -> Result<Response<Body>, Problem> {
        let limit = self.inner.config.max_batch_records;
        if records.len() > limit {
            return Err(Problem::new(
                Code::INVALID_REQUEST,
                format!("`records` has {} records (limit {limit}); send smaller batches", records.len()),
            )
            .at_field("records"));
        }
        // Computed once per batch instead of once per record.
        let content = if context.has_idempotency_key() { digest(&[body]) } else { [0; 32] };
        let until = Instant::now() + self.inner.http.limits().timeout;
        let mut parts = Vec::with_capacity(records.len());
        for (part, raw) in records.iter().enumerate() {
            let number = RecordNumber::Part(part as u64, until);
            let mut taken = self.take_part(raw.get().as_bytes(), &content, topic, context, number).await;
            taken.taken = taken.taken.map_err(|problem| problem.within(&format!("/records/{part}")));
            parts.push(self.settle_part(taken));
        }
        let results: Vec<Value> = join_all(parts).await;
        let success = results.iter().all(|result| result["success"] == true);
        Ok(json_response(
            if success { 200 } else { 207 },
            json!({"success": success, "results": results}).to_string().into_bytes(),
        ))
    }

    /// Parses one record of a batch or stream and passes it to the producer. Call it for one record
    /// at a time.
    pub(super) async fn take_part(
        &self,
        record: &[u8],
        content: &[u8],
        topic: Option<&str>,
        context: &RequestContext,
        number: RecordNumber,
    ) -> Part {
        match Record::parse(record, "record") {
            Ok(Decoded { value, near_misses, .. }) => {
                Part { taken: self.hand_over(value, content, topic, context, number).await, near_misses }
            }
            Err(refused) => Part { taken: Err(refused.problem), near_misses: refused.near_misses },
        }
    }

    /// Waits for the outcome of a record and returns its position or error as an object. Calls may
    /// run concurrently.
    pub(super) async fn settle_part(&self, part: Part) -> Value {
        let mut result = match part.taken {
            Ok(taken) => part_result(self.settle(taken).await),
            Err(problem) => part_result(Err(problem)),
        };
        if !part.near_misses.is_empty() {
            warning::count(ROUTE, &part.near_misses);
            result["warnings"] = part.near_misses.iter().map(ToString::to_string).collect();
        }
        result
    }

    fn explain(&self, error: &SendError, topic: &str) -> Problem {
        // The cached limits of the topic may be out of date.
        if matches!(error, SendError::UnknownTopic(_) | SendError::TooLarge { .. } | SendError::Rejected(_)) {
            self.inner.topics.forget(topic);
        }
        let code = match error {
            SendError::Full => Code::OVERLOADED,
            SendError::Unavailable => Code::KAFKA_UNAVAILABLE,
            SendError::UnknownTopic(_) => Code::UNKNOWN_TOPIC,
            SendError::UnknownPartition => Code::INVALID_REQUEST,
            SendError::TooLarge { .. } => Code::BODY_TOO_LARGE,
            SendError::Unknown => Code::OUTCOME_UNKNOWN,
            // A record without a key for a compacted topic, or a timestamp outside the topic's
            // range: a retry would not help.
            SendError::Rejected(RDKafkaErrorCode::InvalidRecord | RDKafkaErrorCode::InvalidTimestamp) => {
                Code::INVALID_REQUEST
            }
            SendError::Rejected(_) => Code::KAFKA_REJECTED,
        };
        let problem = Problem::new(code, error.to_string());
        if matches!(error, SendError::UnknownPartition) { problem.at_field("partition") } else { problem }
    }
}

/// State of the process.
#[derive(Serialize, ToSchema)]
#[schema(as = Health)]
pub struct HealthAnswer {
    /// Always `healthy`: the process answers.
    status: &'static str,
}

/// Report that the process is running
///
/// Asks no dependency. Probes that do are on the management port.
#[utoipa::path(
    get,
    path = "/health",
    operation_id = "getHealth",
    tag = "gateway",
    responses((status = 200, description = "The process answers", body = HealthAnswer), NoInput),
)]
async fn health() -> axum::Json<HealthAnswer> {
    axum::Json(HealthAnswer { status: "healthy" })
}
