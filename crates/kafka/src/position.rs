//! Positions in topics. Clients see a position as an opaque token such as `messages/3@1234`.

use std::{fmt, str::FromStr};

/// Topic, partition, offset and epoch. The token contains the epoch unless it is 0, so a position
/// in a replaced topic is never mistaken for one in its successor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
    pub epoch: u32,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}@{}", self.topic, self.partition, self.offset)?;
        if self.epoch > 0 { write!(f, ".{}", self.epoch) } else { Ok(()) }
    }
}

/// Partition of a topic, with the epoch that counts how often the topic was replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PartitionId {
    pub epoch: u32,
    pub partition: i32,
}

/// Error for a text that is not a position.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a position such as `messages/3@1234`")]
pub struct NotAPosition;

impl FromStr for Position {
    type Err = NotAPosition;

    fn from_str(text: &str) -> Result<Self, NotAPosition> {
        let (topic_partition, offset) = text.rsplit_once('@').ok_or(NotAPosition)?;
        let (topic, partition) = topic_partition.rsplit_once('/').ok_or(NotAPosition)?;
        let (offset, epoch) = offset.split_once('.').unwrap_or((offset, "0"));
        let number = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_digit());
        if topic.is_empty() || ![partition, offset, epoch].into_iter().all(number) {
            return Err(NotAPosition);
        }
        Ok(Self {
            topic: topic.to_owned(),
            partition: partition.parse().map_err(|_| NotAPosition)?,
            offset: offset.parse().map_err(|_| NotAPosition)?,
            epoch: epoch.parse().map_err(|_| NotAPosition)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_reads_back_as_written() {
        for text in ["messages/3@1234", "a.b-c_d/0@0", "messages/3@1234.2"] {
            assert_eq!(text.parse::<Position>().unwrap().to_string(), text);
        }
        for bad in
            ["", "messages", "messages/3", "messages/x@1", "/3@1", "messages/3@", "messages/3@-1", "m/99999999999@1"]
        {
            assert_eq!(bad.parse::<Position>(), Err(NotAPosition), "{bad}");
        }
    }
}
