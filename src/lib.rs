//! postrider: events in over HTTP, kept in Kafka, carried to where they are wanted.
//!
//! The rooms: [`kv`] is a key-value view in Redis, [`gateway`] carries HTTP to Kafka. They share
//! [`platform`] and nothing else; [`roles`] is where they meet.

pub mod cli;
pub mod gateway;
pub mod kv;
pub mod platform;
pub mod roles;
