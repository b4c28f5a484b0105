//! postrider: events in over HTTP, kept in Kafka, carried to where they are wanted.
//!
//! The rooms: [`kv`] is a key-value view in Redis, [`gateway`] carries HTTP to Kafka, [`comments`] are
//! stored in Postgres, listed and streamed, [`messages`] reach every open connection of their receiver, [`feed`] brings
//! posts to followers, [`outbox`] brings to Kafka what was stored in Postgres first, [`dlq`] keeps what was given up. They share [`platform`] and nothing else; [`roles`] is where they meet.

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
