//! Integration tests that run one or several real processes against real Kafka, Redis and Postgres.
//!
//! Every test has its own [`harness::World`]: topics, groups, Redis keys and a Postgres schema under
//! a prefix that no other test uses. So all tests can run in parallel.

// Test code may panic: the message names the failed expectation.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod batches;
mod black_holes;
mod cli;
mod cli_answers;
mod comments;
mod comments_faults;
mod comments_stream;
mod consumer;
mod consumer_outcomes;
mod dashboards;
mod decoding;
mod dlq;
mod dlq_http;
mod dropped_packets;
mod errors;
mod examples;
mod expelled;
mod feed;
mod feed_events;
mod feed_faults;
mod feed_model;
mod feed_plans;
mod feed_retention;
mod feed_writes;
mod gateway;
mod growth;
mod harness;
mod hostile;
mod http;
mod isolation;
mod kv;
mod kv_cluster;
mod kv_loss;
mod kv_order;
mod kv_poison;
mod lag;
mod logs;
mod memory;
mod messages;
mod messages_faults;
mod messages_undelivered;
mod messages_unread;
mod migrations;
mod openapi;
mod ops;
mod outages;
mod outbound;
mod outbox;
mod outbox_quarantine;
mod presence;
mod presence_faults;
mod regressions;
mod relay;
mod relay_command;
mod relay_faults;
mod replay;
mod replication;
mod rotation;
mod roundtrip;
mod shutdown;
mod soak;
mod streams;
mod stuck_clients;
mod tls;
mod traces;
mod transactions;
mod unknown_values;
mod upkeep;
mod websocket;
mod websocket_hostile;
