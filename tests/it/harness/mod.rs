//! The test harness: server stacks, processes of the product, and checkers of their results.

pub mod answer;
pub mod app;
pub mod changes;
pub mod check;
pub mod device;
pub mod heartbeat_proxy;
pub mod inbox;
pub mod issuer;
pub mod kafka;
pub mod load;
pub mod mailbox;
pub mod member;
pub mod metadata_proxy;
pub mod network;
pub mod otlp;
pub mod produce;
pub mod proxy;
pub mod raw;
pub mod redis;
pub mod sessions;
pub mod socket;
pub mod sse;
pub mod stack;
pub mod target;
pub mod tools;
pub mod variables;
pub mod wait;
pub mod world;

pub use answer::Answer;
pub use app::App;
pub use stack::Stack;
pub use wait::until;
pub use world::World;
