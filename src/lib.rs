//! postrider accepts events over HTTP, stores them in Kafka and delivers them.
//!
//! Each capability is a module: [`kv`] is a key-value view in Redis; [`gateway`] produces HTTP
//! requests to Kafka and delivers topics over HTTP; [`comments`] stores comments in Postgres, lists
//! and streams them; [`messages`] delivers messages to every open connection of their receiver;
//! [`feed`] fans posts out to followers; [`outbox`] drains the Postgres outbox to Kafka; [`dlq`]
//! lists, replays and purges dead letters. Capabilities share only [`platform`]; [`roles`] combines
//! them into processes.

pub mod cli;
pub mod comments;
pub mod dlq;
pub mod feed;
pub mod gateway;
pub mod kv;
pub mod messages;
pub mod outbox;
pub mod platform;
pub mod roles;
