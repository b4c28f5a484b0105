//! Parses server-sent events.

/// An event with data. Comments and events without data only change the id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub kind: String,
    pub data: String,
}

/// Parser of one stream.
#[derive(Default)]
pub struct Events {
    buffer: Vec<u8>,
    /// Id of the last event, with which the stream is resumed.
    pub id: Option<String>,
    /// The event that is being received; it counts once it is complete.
    next_id: Option<String>,
    kind: String,
    data: Vec<String>,
}

impl Events {
    /// Creates the parser of a stream that continues after an event.
    pub fn after(id: Option<String>) -> Self {
        Self { id, ..Self::default() }
    }

    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Returns the next complete event.
    pub fn next(&mut self) -> Option<Event> {
        while let Some(at) = self.buffer.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.buffer.drain(..=at).collect();
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end_matches(['\n', '\r']);
            if line.is_empty() {
                self.id = self.next_id.take().or(self.id.take());
                let kind = std::mem::take(&mut self.kind);
                let data = std::mem::take(&mut self.data);
                if !data.is_empty() {
                    let kind = if kind.is_empty() { "message".to_owned() } else { kind };
                    return Some(Event { kind, data: data.join("\n") });
                }
                continue;
            }
            let (name, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value).to_owned();
            match name {
                "id" => self.next_id = Some(value),
                "event" => self.kind = value,
                "data" => self.data.push(value),
                // `retry`, comments and unknown fields.
                _ => {}
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_found_in_any_split_of_the_stream_and_count_once_complete() {
        let stream = "retry: 1000\nid: 1\n\n: heartbeat\n\nid: 2\ndata: {\ndata: \"a\":1}\n\nid: 3\nevent: gap\ndata: x\n\nid: 4\ndata: half";
        let event = |kind: &str, data: &str| Event { kind: kind.to_owned(), data: data.to_owned() };
        for size in 1..stream.len() {
            let (mut events, mut seen) = (Events::after(Some("0".to_owned())), Vec::new());
            for part in stream.as_bytes().chunks(size) {
                events.push(part);
                seen.extend(std::iter::from_fn(|| events.next()));
            }
            assert_eq!(seen, [event("message", "{\n\"a\":1}"), event("gap", "x")]);
            assert_eq!(events.id.as_deref(), Some("3"), "an unfinished event must be sent again");
        }
    }
}
