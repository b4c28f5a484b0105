//! Timelines: lists of post ids in Redis, built from Postgres when a feed is read.
//!
//! - [`protocol`]: the layout in Redis, and how lists are merged into a feed
//! - [`writer`]: the projection's changes to timelines
//! - [`reader`]: reads by api processes, many in one round trip
//! - [`epoch`]: the epoch in Postgres, which makes older timelines obsolete
//! - [`near_cache`]: timelines in the memory of an api process

mod epoch;
mod near_cache;
mod protocol;
mod reader;
mod writer;

pub use epoch::{NewestEpoch, Raises, SEEN_AFTER};
pub use protocol::{BUILD_MS, Keys, List, MARK_SCORE, Mark, Owner, ids, mark, members, merge, number};
pub use reader::{Asking, Question, Sight, TimelineReader};
pub use writer::TimelineWriter;
