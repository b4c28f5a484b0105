//! Timelines: lists of post ids in Redis, made from Postgres when somebody reads a feed.
//!
//! - [`protocol`]: the layout in Redis, and how lists are merged into a feed
//! - [`writer`]: what the projection does to timelines
//! - [`reader`]: reads by api processes, many in one round trip
//! - [`near_cache`]: timelines in the memory of an api process

mod near_cache;
mod protocol;
mod reader;
mod writer;

pub use protocol::{BUILD_MS, Keys, List, MARK_SCORE, Mark, Owner, ids, mark, members, merge, number};
pub use reader::{Asking, Question, Sight, TimelineReader};
pub use writer::TimelineWriter;
