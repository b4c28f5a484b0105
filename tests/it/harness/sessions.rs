//! Records of the messages that devices got on each connection.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use serde_json::Value;

/// The identity of a message: its receiver, its sender and its number.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    pub receiver: String,
    pub sender: String,
    pub number: u64,
}

impl Name {
    /// Returns the name of a message whose content begins with a number.
    pub fn of(message: &Value) -> Option<Self> {
        let text = |field: &str| message[field].as_str().map(str::to_owned);
        let number = message["content"].as_str()?.split(' ').next()?.parse().ok()?;
        Some(Self { receiver: text("receiverId")?, sender: text("senderId")?, number })
    }
}

/// The protocol by which a device connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// A WebSocket without a subprotocol.
    Plain,
    /// `postrider.v1` with acknowledgements; begins at the receiver's cursor.
    Acks,
    /// `postrider.v1`; resumes after the device's last message.
    Cursors,
    /// Server-sent events; resume after the device's last message.
    Events,
}

impl Style {
    pub fn has_own_place(self) -> bool {
        matches!(self, Self::Cursors | Self::Events)
    }

    /// Returns whether such a device moves its receiver's cursor: by pongs, acknowledgements or
    /// `Last-Event-ID`.
    pub fn moves_cursor(self) -> bool {
        !matches!(self, Self::Cursors)
    }
}

/// One connection of a device.
#[derive(Debug, Clone)]
pub struct Session {
    pub device: String,
    pub receiver: String,
    pub style: Style,
    /// The time of the connection attempt, and the time at which it succeeded.
    pub asked_ms: u64,
    pub open_ms: u64,
    pub got: Vec<Got>,
}

/// A received message, or a gap notice if the name is `None`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Got {
    pub name: Option<Name>,
    pub at_ms: u64,
}

/// A deliberate fault in the records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trick {
    Drop,
    Duplicate,
    Swap,
    Leak,
}

/// The records of all sessions. Cheap to clone.
#[derive(Clone)]
pub struct Notebook {
    began: Instant,
    pages: Arc<Mutex<Pages>>,
}

#[derive(Default)]
struct Pages {
    sessions: Vec<Session>,
    /// The fault to inject, and the number of the message to inject it into, counted over devices
    /// with their own position.
    trick: Option<(Trick, usize)>,
    /// A message to record after the next one of its session.
    held: Option<(usize, Got)>,
}

impl Notebook {
    /// Creates a notebook whose times are relative to `began`.
    pub fn new(began: Instant, trick: Option<(Trick, usize)>) -> Self {
        Self { began, pages: Arc::new(Mutex::new(Pages { trick, ..Pages::default() })) }
    }

    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap()
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn sessions(&self) -> Vec<Session> {
        self.pages().sessions.clone()
    }

    /// Returns the time of the last message to any device.
    pub fn last_ms(&self) -> Option<u64> {
        self.pages().sessions.iter().filter_map(|session| session.got.last()).map(|got| got.at_ms).max()
    }

    /// Records that a device is connected. Returns the number of the session.
    pub fn open(&self, device: &str, receiver: &str, style: Style, asked_ms: u64) -> usize {
        let (device, receiver, open_ms) = (device.to_owned(), receiver.to_owned(), self.now_ms());
        let mut pages = self.pages();
        pages.sessions.push(Session { device, receiver, style, asked_ms, open_ms, got: Vec::new() });
        pages.sessions.len() - 1
    }

    /// Records a message or a gap. Call this before the device acknowledges it to the server.
    pub fn take(&self, session: usize, name: Option<Name>) {
        let got = Got { name, at_ms: self.now_ms() };
        let mut pages = self.pages();
        match pages.trick(session, &got) {
            Some(Trick::Drop) => return,
            Some(Trick::Swap) => {
                pages.held = Some((session, got));
                return;
            }
            Some(Trick::Duplicate) => pages.sessions[session].got.push(got.clone()),
            Some(Trick::Leak) => {
                let receiver = pages.sessions[session].receiver.clone();
                let other = pages.sessions.iter_mut().rfind(|other| other.receiver != receiver);
                other.expect("devices of several receivers").got.push(got.clone());
            }
            None => {}
        }
        pages.sessions[session].got.push(got);
        if let Some((_, late)) = pages.held.take_if(|(of, _)| *of == session) {
            pages.sessions[session].got.push(late);
        }
    }
}

impl Pages {
    fn trick(&mut self, session: usize, got: &Got) -> Option<Trick> {
        let fits = self.sessions[session].style.has_own_place() && got.name.is_some();
        let (trick, left) = self.trick.as_mut().filter(|_| fits)?;
        *left = left.checked_sub(1)?;
        (*left == 0).then_some(*trick)
    }
}
