//! Settings of Kafka's clients, and the client properties made from them.

use rdkafka::{
    ClientConfig,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, ConsumerContext},
    error::KafkaError,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{client_watchdog::REPORT_INTERVAL_MS, dead_letter, outgoing::Purpose};
use crate::platform::config::{Properties, Secret};

/// Largest batch of several records, in bytes before compression. Below the brokers' default for topics, so that only a
/// topic that was set to less refuses a batch for its size.
pub(super) const BATCH_BYTES: usize = 1_000_000;

/// How Kafka is reached, written to and read from.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Bootstrap brokers, each `host:port`.
    pub brokers: Vec<String>,
    /// How connections are secured.
    pub security_protocol: SecurityProtocol,
    pub sasl: Sasl,
    pub tls: Tls,
    /// Put before the names of our own topics, so that installations can share a cluster.
    pub topic_prefix: String,
    /// Put before the names of our consumer groups.
    pub group_prefix: String,
    pub topics: Topics,
    pub producer: ProducerConfig,
    pub consumer: ConsumerConfig,
    /// Further librdkafka properties for every client, such as `client.rack`. They win over ours.
    pub properties: Properties,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            brokers: vec!["127.0.0.1:9092".to_owned()],
            security_protocol: SecurityProtocol::Plaintext,
            sasl: Sasl::default(),
            tls: Tls::default(),
            topic_prefix: String::new(),
            group_prefix: String::new(),
            topics: Topics::default(),
            producer: ProducerConfig::default(),
            consumer: ConsumerConfig::default(),
            properties: Properties::default(),
        }
    }
}

/// Kafka's own names, in lower case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SecurityProtocol {
    Plaintext,
    Ssl,
    SaslPlaintext,
    SaslSsl,
}

impl SecurityProtocol {
    fn property(self) -> &'static str {
        match self {
            Self::Plaintext => "plaintext",
            Self::Ssl => "ssl",
            Self::SaslPlaintext => "sasl_plaintext",
            Self::SaslSsl => "sasl_ssl",
        }
    }

    fn has_sasl(self) -> bool {
        matches!(self, Self::SaslPlaintext | Self::SaslSsl)
    }
}

/// Who we are, where `security_protocol` has SASL.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Sasl {
    /// `SCRAM-SHA-512`, `SCRAM-SHA-256` or `PLAIN`.
    pub mechanism: String,
    /// Who we are to the brokers.
    pub username: String,
    /// What proves it.
    pub password: Secret,
}

impl Default for Sasl {
    fn default() -> Self {
        Self { mechanism: "SCRAM-SHA-512".to_owned(), username: String::new(), password: Secret::default() }
    }
}

/// Certificates, where `security_protocol` has TLS. All files are PEM.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Tls {
    /// The authorities that brokers are checked against; without it the system's.
    pub ca_file: String,
    /// Our own certificate, where brokers demand one (mTLS).
    pub certificate_file: String,
    /// The key of our certificate.
    pub key_file: String,
    /// The password of `key_file`, where it has one.
    pub key_password: Secret,
    /// Whether the broker's name must be in its certificate.
    pub verify_hostname: bool,
}

impl Default for Tls {
    fn default() -> Self {
        Self {
            ca_file: String::new(),
            certificate_file: String::new(),
            key_file: String::new(),
            key_password: Secret::default(),
            verify_hostname: true,
        }
    }
}

/// What happens to our own topics at start.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Topics {
    /// Create those that are missing; otherwise they are only checked.
    pub create: bool,
    /// Replicas of topics that we create; -1 takes the broker's default. Existing topics with fewer are named in
    /// readiness; with -1 those with fewer than three, or than there are brokers.
    pub replication_factor: i32,
    /// `min.insync.replicas` of topics that we create: how many replicas must have a record before it is acknowledged. -1
    /// derives it from the replicas: 2 where there are three or more, else 1. Existing topics that differ are named in
    /// readiness.
    pub min_insync_replicas: i32,
}

impl Default for Topics {
    fn default() -> Self {
        Self { create: true, replication_factor: -1, min_insync_replicas: -1 }
    }
}

/// The producer: always idempotent, always `acks=all`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ProducerConfig {
    /// Time that a write waits for its record to be confirmed, in milliseconds. After that its outcome is
    /// unknown; the record itself is never given up.
    pub delivery_timeout_ms: u64,
    /// Records in flight at most; beyond it writes are refused with 503 `overloaded`.
    pub max_in_flight_records: usize,
    /// Bytes in flight at most, keys, values and headers together.
    pub max_in_flight_bytes: usize,
    /// Time a record waits at least for others to share a request with, in microseconds. With many
    /// writers the wait grows by itself, by 1.5 ms at most.
    pub linger_us: u64,
    /// Requests in flight per broker, 1 to 5.
    pub max_in_flight_requests: u32,
    /// `lz4`, `zstd`, `snappy`, `gzip` or `none`.
    pub compression: String,
    /// Largest record in bytes, as the topics' `max.message.bytes` allows. The dead-letter topics are made
    /// to take somewhat more.
    pub max_message_bytes: u32,
}

impl Default for ProducerConfig {
    fn default() -> Self {
        Self {
            delivery_timeout_ms: 9_000,
            max_in_flight_records: 100_000,
            max_in_flight_bytes: 64 << 20,
            linger_us: 500,
            max_in_flight_requests: 2,
            compression: "lz4".to_owned(),
            max_message_bytes: 1_048_588,
        }
    }
}

/// The consumers.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ConsumerConfig {
    /// How groups are joined: `consumer` is KIP-848, `classic` the older protocol with cooperative-sticky
    /// assignment, `auto` the first where brokers offer it.
    pub group_protocol: GroupProtocol,
    /// Time without a heartbeat after which the group takes a member for dead, in milliseconds. With
    /// KIP-848 brokers decide that: `group.consumer.session.timeout.ms`.
    pub session_timeout_ms: u64,
    /// Time that a consumer may have records to work on and finish nothing, in milliseconds. Then the
    /// process says that it is not live.
    pub stall_timeout_ms: u64,
    /// Most that is fetched ahead of the handlers, in KiB per process and topic. Less where that is more than a sixteenth of
    /// the memory budget of consumers.
    pub prefetch_kib: u32,
}

/// See [`ConsumerConfig::group_protocol`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum GroupProtocol {
    Auto,
    Classic,
    Consumer,
}

impl Default for ConsumerConfig {
    fn default() -> Self {
        Self {
            group_protocol: GroupProtocol::Auto,
            session_timeout_ms: 10_000,
            stall_timeout_ms: 120_000,
            prefetch_kib: 16 << 10,
        }
    }
}

impl Config {
    /// The properties that every client shares. `client` names it in logs and metrics.
    pub fn client(&self, client: &str) -> ClientConfig {
        let mut properties = ClientConfig::new();
        properties
            .set_log_level(RDKafkaLogLevel::Warning)
            .set("bootstrap.servers", self.brokers.join(","))
            .set("client.id", format!("postrider-{client}"))
            .set("security.protocol", self.security_protocol.property())
            .set("statistics.interval.ms", REPORT_INTERVAL_MS.to_string())
            .set("socket.keepalive.enable", "true")
            // A connection that packets are dropped of while it is made is tried again ever less often by the kernel.
            .set("socket.connection.setup.timeout.ms", "10000")
            .set("socket.nagle.disable", "true")
            .set("reconnect.backoff.ms", "50")
            .set("reconnect.backoff.max.ms", "1000")
            .set("topic.metadata.refresh.interval.ms", "60000")
            .set("log.connection.close", "false");
        if self.security_protocol.has_sasl() {
            properties
                .set("sasl.mechanism", &self.sasl.mechanism)
                .set("sasl.username", &self.sasl.username)
                .set("sasl.password", self.sasl.password.expose());
        }
        let tls = &self.tls;
        let files = [
            ("ssl.ca.location", &tls.ca_file),
            ("ssl.certificate.location", &tls.certificate_file),
            ("ssl.key.location", &tls.key_file),
        ];
        for (property, file) in files.into_iter().filter(|(_, file)| !file.is_empty()) {
            properties.set(property, file);
        }
        if !tls.key_password.is_empty() {
            properties.set("ssl.key.password", tls.key_password.expose());
        }
        if !tls.verify_hostname {
            properties.set("ssl.endpoint.identification.algorithm", "none");
        }
        properties
    }

    /// Makes a client that looks things up and never consumes: the one kind whose questions create no topic. The library
    /// demands a group, which it never joins.
    pub(super) fn observer<C: ConsumerContext>(
        &self,
        client: &str,
        group: &str,
        context: C,
    ) -> Result<BaseConsumer<C>, KafkaError> {
        let mut properties = self.client(client);
        properties
            .set("group.id", group)
            .set("enable.auto.commit", "false")
            .set("allow.auto.create.topics", "false")
            .set("statistics.interval.ms", "0");
        self.with_overrides(properties).create_with_context(context)
    }

    /// Applies the operator's own properties, last.
    pub fn with_overrides(&self, mut properties: ClientConfig) -> ClientConfig {
        for (name, value) in self.properties.iter() {
            properties.set(name, value);
        }
        properties
    }

    /// The properties of a producer.
    pub fn producer_client(&self, purpose: Purpose) -> ClientConfig {
        let producer = &self.producer;
        let request_timeout_ms = producer.delivery_timeout_ms.clamp(1_000, 5_000);
        let in_flight = u64::from(producer.max_in_flight_requests.clamp(1, 5));
        let mut properties = self.client(purpose.client());
        properties
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("partitioner", "murmur2_random")
            .set("compression.type", &producer.compression)
            .set("linger.ms", (producer.linger_us as f64 / 1_000.0).to_string())
            .set("batch.size", BATCH_BYTES.to_string())
            // Never: see `Receipt::stored`.
            .set("message.timeout.ms", "0")
            .set("request.timeout.ms", request_timeout_ms.to_string())
            // A broker answers each request in flight within the request's timeout, also when replicas are slow. The client
            // reconnects to one that is silent for longer and sends the same batches, which the broker recognizes.
            .set("socket.timeout.ms", (request_timeout_ms * in_flight + 1_000).to_string())
            .set("max.in.flight.requests.per.connection", in_flight.to_string())
            // A dead letter is its record and something more.
            .set("message.max.bytes", producer.max_message_bytes.saturating_add(dead_letter::ROOM_BYTES).to_string())
            // Admission is ours and comes first, so the library's own bounds are never met.
            .set("queue.buffering.max.messages", producer.max_in_flight_records.saturating_mul(2).to_string())
            .set("queue.buffering.max.kbytes", (producer.max_in_flight_bytes / 512).max(1_024).to_string());
        if purpose == Purpose::Alone {
            properties.set("batch.num.messages", "1").set("linger.ms", "0");
        }
        self.with_overrides(properties)
    }

    /// The name of one of our own topics.
    pub fn topic(&self, name: &str) -> String {
        format!("{}{name}", self.topic_prefix)
    }

    /// The name of one of our consumer groups.
    pub fn group(&self, name: &str) -> String {
        format!("{}{name}", self.group_prefix)
    }
}
