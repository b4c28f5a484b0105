//! Configuration of the Kafka clients, and the librdkafka properties built from it.

use postrider_config::{Properties, Secret};
use rdkafka::{
    ClientConfig,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, ConsumerContext},
    error::KafkaError,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{client_watchdog::REPORT_INTERVAL_MS, dead_letter, outgoing::Purpose};

/// Largest batch of several records, in bytes before compression. It is below the brokers' default
/// topic limit, so only a topic with a lower limit rejects a batch for its size.
pub(super) const BATCH_BYTES: usize = 1_000_000;

/// Connection, producer and consumer settings for Kafka.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Bootstrap brokers, each `host:port`.
    pub brokers: Vec<String>,
    /// Security protocol of the connections to the brokers.
    pub security_protocol: SecurityProtocol,
    pub sasl: Sasl,
    pub tls: Tls,
    /// Prefix of the names of postrider's own topics, so that several installations can share a
    /// cluster.
    pub topic_prefix: String,
    /// Prefix of the names of postrider's consumer groups.
    pub group_prefix: String,
    pub topics: Topics,
    pub producer: ProducerConfig,
    pub consumer: ConsumerConfig,
    /// Additional librdkafka properties for every client, such as `client.rack`. They override the
    /// properties that postrider sets.
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

/// Security protocol, by Kafka's name in lower case.
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

/// SASL credentials, used when `security_protocol` includes SASL.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Sasl {
    /// `SCRAM-SHA-512`, `SCRAM-SHA-256` or `PLAIN`.
    #[schemars(extend("enum" = ["SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN"]))]
    pub mechanism: String,
    /// User name that postrider authenticates with.
    pub username: String,
    /// Password of `username`.
    pub password: Secret,
}

impl Default for Sasl {
    fn default() -> Self {
        Self { mechanism: "SCRAM-SHA-512".to_owned(), username: String::new(), password: Secret::default() }
    }
}

/// TLS files, used when `security_protocol` includes TLS. All files are PEM.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Tls {
    /// CA certificates that the brokers' certificates are verified against; empty uses the system's
    /// CA certificates.
    pub ca_file: String,
    /// Client certificate, for brokers that require one (mTLS).
    pub certificate_file: String,
    /// Private key of `certificate_file`.
    pub key_file: String,
    /// Password of `key_file`, if the key is encrypted.
    pub key_password: Secret,
    /// Verify that the broker's certificate contains the broker's host name.
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

/// Creation and checks of postrider's own topics at start.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Topics {
    /// Create missing topics; if false, postrider only checks them.
    pub create: bool,
    /// Replication factor of the topics that postrider creates; -1 uses the broker's default.
    /// Readiness names existing topics with fewer replicas; with -1, it names topics with fewer
    /// than three replicas, or fewer than there are brokers if the cluster has fewer than three.
    #[schemars(range(min = -1, max = 32_767))]
    pub replication_factor: i32,
    /// `min.insync.replicas` of the topics that postrider creates: the number of replicas that must
    /// store a record before it is acknowledged. -1 derives it from the number of replicas: 2 for
    /// three or more replicas, otherwise 1. Readiness names existing topics that differ.
    #[schemars(range(min = -1))]
    pub min_insync_replicas: i32,
}

impl Default for Topics {
    fn default() -> Self {
        Self { create: true, replication_factor: -1, min_insync_replicas: -1 }
    }
}

/// Producer settings. The producer is always idempotent and uses `acks=all`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ProducerConfig {
    /// Time that a write waits for its record to be acknowledged, in milliseconds. After that the
    /// outcome is unknown; the producer keeps trying to store the record.
    #[schemars(range(min = 1, max = 900_000))]
    pub delivery_timeout_ms: u64,
    /// Maximum number of records in flight; beyond it, writes are rejected with 503 `overloaded`.
    #[schemars(range(min = 1))]
    pub max_in_flight_records: usize,
    /// Maximum number of bytes in flight, counting keys, values and headers.
    #[schemars(range(min = 1))]
    pub max_in_flight_bytes: usize,
    /// Minimum time that a record waits for others to share a request with, in microseconds. With
    /// many concurrent writers the wait grows automatically by up to 1.5 ms.
    #[schemars(range(max = 1_000_000))]
    pub linger_us: u64,
    /// Compression codec: `lz4`, `zstd`, `snappy`, `gzip` or `none`.
    pub compression: String,
    /// Largest record in bytes; the topics' `max.message.bytes` must allow it. Dead-letter topics
    /// are created with a somewhat higher limit.
    #[schemars(range(min = 1_000, max = 1_000_000_000))]
    pub max_message_bytes: u32,
}

impl Default for ProducerConfig {
    fn default() -> Self {
        Self {
            delivery_timeout_ms: 9_000,
            max_in_flight_records: 100_000,
            max_in_flight_bytes: 64 << 20,
            linger_us: 500,
            compression: "lz4".to_owned(),
            max_message_bytes: 1_048_588,
        }
    }
}

/// Consumer settings.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ConsumerConfig {
    /// Group protocol: `consumer` is KIP-848, `classic` is the older protocol with
    /// cooperative-sticky assignment, and `auto` uses KIP-848 if the brokers offer it, otherwise
    /// `classic`.
    pub group_protocol: GroupProtocol,
    /// Time without a heartbeat after which the group removes a member, in milliseconds. With
    /// KIP-848 the brokers decide it with `group.consumer.session.timeout.ms`.
    #[schemars(range(min = 1, max = 3_600_000))]
    pub session_timeout_ms: u64,
    /// Time that a consumer may have records to process without finishing any, in milliseconds.
    /// After that the process fails its liveness probe.
    #[schemars(range(min = 1, max = 86_400_000))]
    pub stall_timeout_ms: u64,
    /// Maximum amount of data fetched ahead of the handlers, in KiB per process and topic. The
    /// limit is lower if this exceeds a sixteenth of the consumers' memory budget.
    #[schemars(range(min = 1, max = 2_097_151))]
    pub prefetch_kib: u32,
}

/// Group protocol that consumers join with; see [`ConsumerConfig::group_protocol`].
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
    /// Returns the properties that every client shares. `client` names the client in logs and
    /// metrics.
    pub fn client(&self, client: &str) -> ClientConfig {
        let mut properties = ClientConfig::new();
        properties
            .set_log_level(RDKafkaLogLevel::Warning)
            .set("bootstrap.servers", self.brokers.join(","))
            .set("client.id", format!("postrider-{client}"))
            .set("security.protocol", self.security_protocol.property())
            .set("statistics.interval.ms", REPORT_INTERVAL_MS.to_string())
            .set("socket.keepalive.enable", "true")
            // While packets of a connection attempt are dropped, the kernel retries them at growing
            // intervals; a new attempt connects sooner.
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

    /// Creates a client that only looks up metadata and offsets and never joins a group. Lookups by
    /// this kind of client create no topics. The library requires a group id.
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

    /// Applies the operator's `kafka.properties`, which override all others.
    pub fn with_overrides(&self, mut properties: ClientConfig) -> ClientConfig {
        for (name, value) in self.properties.iter() {
            properties.set(name, value);
        }
        properties
    }

    /// Returns the properties of a producer.
    pub fn producer_client(&self, purpose: Purpose) -> ClientConfig {
        let producer = &self.producer;
        let request_timeout_ms = producer.delivery_timeout_ms.clamp(1_000, 5_000);
        let mut properties = self.client(purpose.client());
        properties
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("partitioner", "murmur2_random")
            .set("compression.type", &producer.compression)
            .set("linger.ms", (producer.linger_us as f64 / 1_000.0).to_string())
            .set("batch.size", BATCH_BYTES.to_string())
            // Records never time out; see `Receipt::stored`.
            .set("message.timeout.ms", "0")
            .set("request.timeout.ms", request_timeout_ms.to_string())
            // A broker answers the request in flight within the request's timeout, also when replicas are slow. The client
            // reconnects to one that is silent for longer and sends the same batch, which the broker recognizes.
            .set("socket.timeout.ms", (request_timeout_ms + 1_000).to_string())
            // With a second one, a broker that refuses the first (too few replicas in sync) and then accepts requests again
            // sees a gap in the numbers. The library renumbers all records then, and the broker stores those again that it
            // already has.
            .set("max.in.flight.requests.per.connection", "1")
            // A dead letter is its record and something more.
            .set("message.max.bytes", producer.max_message_bytes.saturating_add(dead_letter::ROOM_BYTES).to_string())
            // Admission control comes first, so the library's own limits are never reached.
            .set("queue.buffering.max.messages", producer.max_in_flight_records.saturating_mul(2).to_string())
            .set("queue.buffering.max.kbytes", (producer.max_in_flight_bytes / 512).max(1_024).to_string());
        if purpose == Purpose::Alone {
            properties.set("batch.num.messages", "1").set("linger.ms", "0");
        }
        self.with_overrides(properties)
    }

    /// Checks all properties as the library does when a client is created.
    pub fn check_properties(&self) -> Result<(), KafkaError> {
        // A producer has the properties of every client, too.
        self.producer_client(Purpose::Internal).create_native_config().map(drop)
    }

    /// Returns the full name of one of postrider's own topics.
    pub fn topic(&self, name: &str) -> String {
        format!("{}{name}", self.topic_prefix)
    }

    /// Returns the full name of one of postrider's consumer groups.
    pub fn group(&self, name: &str) -> String {
        format!("{}{name}", self.group_prefix)
    }
}
