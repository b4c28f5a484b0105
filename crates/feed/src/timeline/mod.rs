//! Timelines: lists of post ids in Redis, built from Postgres when a feed is read.
//!
//! - [`protocol`]: the layout in Redis, and how lists are merged into a feed
//! - [`writer`]: the projection's changes to timelines
//! - [`reader`]: reads by api processes, many in one round trip
//! - [`near_cache`]: timelines in the memory of an api process

mod near_cache;
mod protocol;
mod reader;
mod writer;

pub use protocol::{BUILD_MS, Keys, List, MARK_SCORE, Mark, Owner, ids, mark, members, merge, number};
pub use reader::{Asking, Question, Sight, TimelineReader};
pub use writer::{TimelineWriter, raise_epoch};
