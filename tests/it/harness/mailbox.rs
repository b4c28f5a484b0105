//! Checker of the messages that devices got: each message of the device's receiver once and in
//! order, and no other receiver's.
//!
//! There are two kinds of positions. A device with its own position resumes after the last message
//! that it got, and so gets each message once. A device without one begins at its receiver's
//! cursor, which every acknowledgement of such a device moves. It gets all messages that no device
//! of its receiver has acknowledged, and may get duplicates whose acknowledgement was not recorded.

use std::collections::{BTreeMap, HashMap};

use super::sessions::{Got, Name, Session, Style};

/// A message in the topic.
#[derive(Debug, Clone)]
pub struct Sent {
    pub name: Name,
    pub offset: i64,
    /// Whether the history no longer has the message.
    pub gone: bool,
}

/// All messages of each receiver in order, without duplicates.
pub type Truth = BTreeMap<String, Vec<Sent>>;

/// The receivers' cursors in Postgres at a time.
#[derive(Debug, Clone)]
pub struct Noted {
    pub at_ms: u64,
    pub places: BTreeMap<String, i64>,
}

/// The kinds of faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Breach {
    /// A device got another receiver's message.
    Foreign,
    /// A device lacks a message, or has one twice or out of order.
    Sequence,
    /// A device did not begin at its receiver's cursor.
    Place,
}

/// Returns all faults in these sessions, once all messages have arrived.
pub fn breaches(sessions: &[Session], truth: &Truth, noted: &[Noted]) -> Vec<(Breach, String)> {
    let mut found = foreign(sessions);
    let mut devices: BTreeMap<&str, Vec<&Session>> = BTreeMap::new();
    for session in sessions {
        devices.entry(&session.device).or_default().push(session);
    }
    let mut mailboxes: BTreeMap<&str, Mailbox<'_>> = BTreeMap::new();
    for sessions in devices.into_values() {
        let receiver = sessions[0].receiver.as_str();
        let mailbox = mailboxes.entry(receiver).or_insert_with(|| Mailbox::new(receiver, truth, noted));
        mailbox.note(&sessions);
        mailbox.devices.push(sessions);
    }
    for mut mailbox in mailboxes.into_values() {
        mailbox.sum_up();
        for device in &mailbox.devices {
            mailbox.judge(device, &mut found);
        }
    }
    found
}

/// Returns messages that a device of another receiver got, which is a fault at any time.
pub fn foreign(sessions: &[Session]) -> Vec<(Breach, String)> {
    let others = |session: &Session| {
        let of_others = |got: &&Got| got.name.as_ref().is_some_and(|name| name.receiver != session.receiver);
        let found: Vec<String> = session.got.iter().filter(of_others).map(|got| format!("{got:?}")).collect();
        (!found.is_empty()).then(|| (Breach::Foreign, format!("{} got {}", session.device, found.join(", "))))
    };
    sessions.iter().filter_map(others).collect()
}

/// A receiver, its messages and its devices.
struct Mailbox<'a> {
    sent: &'a [Sent],
    places: HashMap<&'a Name, usize>,
    /// The time at which each message first reached a device that moves the cursor.
    first_ms: Vec<u64>,
    /// The time at which all messages before each one had, except those that the history no longer
    /// has.
    reached_ms: Vec<u64>,
    /// The cursor's offsets by time.
    noted: Vec<(u64, i64)>,
    devices: Vec<Vec<&'a Session>>,
}

impl<'a> Mailbox<'a> {
    fn new(receiver: &str, truth: &'a Truth, noted: &[Noted]) -> Self {
        let sent = truth.get(receiver).map_or(&[][..], Vec::as_slice);
        let noted = noted.iter().filter_map(|noted| Some((noted.at_ms, *noted.places.get(receiver)?))).collect();
        let places = sent.iter().enumerate().map(|(at, sent)| (&sent.name, at)).collect();
        let first_ms = vec![u64::MAX; sent.len()];
        Self { sent, places, first_ms, reached_ms: Vec::new(), noted, devices: Vec::new() }
    }

    fn note(&mut self, sessions: &[&Session]) {
        for got in sessions.iter().filter(|session| session.style.moves_cursor()).flat_map(|session| &session.got) {
            if let Some(&at) = got.name.as_ref().and_then(|name| self.places.get(name)) {
                self.first_ms[at] = self.first_ms[at].min(got.at_ms);
            }
        }
    }

    fn sum_up(&mut self) {
        let mut latest = 0;
        self.reached_ms = vec![latest];
        for (sent, first_ms) in self.sent.iter().zip(&self.first_ms) {
            latest = if sent.gone { latest } else { latest.max(*first_ms) };
            self.reached_ms.push(latest);
        }
    }

    fn judge(&self, device: &[&Session], found: &mut Vec<(Breach, String)>) {
        // The device's own position, and whether it got a gap there.
        let (mut own, mut gap) = (0, false);
        for (number, session) in device.iter().enumerate() {
            let mut wrong = |breach, what: String| {
                found.push((breach, format!("{} (connected at {} ms) {what}", session.device, session.open_ms)));
            };
            let mut at = session.style.has_own_place().then_some(own);
            gap &= at.is_some();
            for got in &session.got {
                let Some(name) = &got.name else {
                    gap = true;
                    if at.is_some_and(|at| self.sent.get(at).is_none_or(|next| !next.gone)) {
                        wrong(Breach::Sequence, format!("was told of a gap at {} ms, where none is", got.at_ms));
                    }
                    continue;
                };
                let Some(&place) = self.places.get(name) else {
                    wrong(Breach::Sequence, format!("got {got:?}, which nobody sent to it"));
                    continue;
                };
                match at {
                    None => self.begins(session, place, gap, &mut wrong),
                    Some(at) => self.follows(session, at, place, gap, &mut wrong),
                }
                (at, gap) = (Some(at.unwrap_or(0).max(place + 1)), false);
            }
            own = at.unwrap_or(own);
            let end = self.sent.len();
            match at {
                _ if number + 1 < device.len() => {}
                // Perhaps no message was left for this device.
                None => self.begins(session, end, gap, &mut wrong),
                Some(at) if at < end => {
                    wrong(Breach::Sequence, format!("did not get {:?} and what is after it", self.sent[at].name));
                }
                Some(_) => {}
            }
        }
    }

    /// Checks the first message of a device without its own position.
    fn begins(&self, session: &Session, place: usize, gap: bool, wrong: &mut impl FnMut(Breach, String)) {
        if gap && !self.sent[..place].iter().any(|sent| sent.gone) {
            wrong(Breach::Sequence, "was told of a gap at its beginning, where none is".to_owned());
        }
        if self.reached_ms[place] > session.open_ms {
            let missed = self.sent[..place].iter().zip(&self.first_ms);
            let missed = missed.filter(|(sent, first_ms)| !sent.gone && **first_ms > session.open_ms);
            let names: Vec<&Name> = missed.map(|(sent, _)| &sent.name).collect();
            wrong(Breach::Place, format!("begins after {names:?}, which no device of its receiver had"));
        }
        let noted = self.noted.iter().rev().find(|(at_ms, _)| *at_ms <= session.asked_ms);
        if let Some((sent, (at_ms, offset))) =
            self.sent.get(place).zip(noted).filter(|(sent, (_, at))| sent.offset <= *at)
        {
            wrong(Breach::Place, format!("begins at {sent:?}, and {offset} was noted at {at_ms} ms"));
        }
    }

    /// Checks a message against those before it.
    fn follows(&self, session: &Session, at: usize, place: usize, gap: bool, wrong: &mut impl FnMut(Breach, String)) {
        let name = &self.sent[place].name;
        if place < at {
            return wrong(Breach::Sequence, format!("got {name:?} again, or late"));
        }
        let skipped = &self.sent[at..place];
        // Plain clients get no gap notice.
        let told = gap || (session.style == Style::Plain && !skipped.is_empty());
        if told == skipped.is_empty() || skipped.iter().any(|sent| !sent.gone) {
            let names: Vec<&Name> = skipped.iter().map(|sent| &sent.name).collect();
            wrong(Breach::Sequence, format!("got {name:?} and not {names:?}; told of a gap: {gap}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::{
        super::sessions::{Notebook, Trick},
        *,
    };

    fn name(receiver: &str, number: u64) -> Name {
        Name { receiver: receiver.to_owned(), sender: "s".to_owned(), number }
    }

    /// Returns five messages to `r`, the first `gone` of which are dropped, and one to `q`.
    fn truth(gone: u64) -> Truth {
        let sent = |number| Sent { name: name("r", number), offset: number as i64 * 10, gone: number <= gone };
        let other = Sent { name: name("q", 1), offset: 11, gone: false };
        BTreeMap::from([("r".to_owned(), (1..=5).map(sent).collect()), ("q".to_owned(), vec![other])])
    }

    /// Returns a session that begins at a time and gets a message each millisecond; 0 is a gap.
    fn session(style: Style, at_ms: u64, numbers: &[u64]) -> Session {
        let got = |(number, after): (&u64, u64)| Got {
            name: (*number > 0).then(|| name("r", *number)),
            at_ms: at_ms + after,
        };
        let device = format!("r-{style:?}");
        let got = numbers.iter().zip(1..).map(got).collect();
        Session { device, receiver: "r".to_owned(), style, asked_ms: at_ms, open_ms: at_ms, got }
    }

    fn check(style: Style, gone: u64, numbers: &[&[u64]]) -> Vec<Breach> {
        let sessions: Vec<_> = numbers.iter().zip(0..).map(|(got, at)| session(style, at * 100, got)).collect();
        breaches(&sessions, &truth(gone), &[]).into_iter().map(|(breach, _)| breach).collect()
    }

    #[test]
    fn a_device_with_a_place_of_its_own_gets_each_once_and_in_order() {
        use Breach::Sequence;
        for style in [Style::Cursors, Style::Events] {
            assert_eq!(check(style, 0, &[&[1, 2], &[], &[3, 4, 5]]), []);
            assert_eq!(check(style, 0, &[&[1, 2, 3, 4]]), [Sequence], "the last is missing");
            assert_eq!(check(style, 0, &[&[1, 2], &[4, 5]]), [Sequence], "3 is missing");
            assert_eq!(check(style, 0, &[&[1, 2], &[2, 3, 4, 5]]), [Sequence], "2 twice");
            assert_eq!(check(style, 0, &[&[1, 3, 2, 4, 5]]), [Sequence; 2], "in another order");
            assert_eq!(check(style, 0, &[&[1, 2, 3, 4, 5, 6]]), [Sequence], "nobody sent it");
        }
    }

    #[test]
    fn a_gap_is_told_where_history_ended_and_nowhere_else() {
        use Breach::Sequence;
        assert_eq!(check(Style::Cursors, 3, &[&[1], &[0], &[0, 4, 5]]), []);
        assert_eq!(check(Style::Events, 3, &[&[1, 0], &[4, 5]]), [], "a stream resumes after the gap");
        assert_eq!(check(Style::Cursors, 3, &[&[1, 2, 3, 4, 5]]), [], "it was there in time");
        assert_eq!(check(Style::Cursors, 3, &[&[1], &[4, 5]]), [Sequence], "not told");
        assert_eq!(check(Style::Cursors, 3, &[&[1], &[0, 5]]), [Sequence], "4 is not gone");
        assert_eq!(check(Style::Cursors, 0, &[&[1], &[0, 2, 3, 4, 5]]), [Sequence; 2], "nothing is gone");
        assert_eq!(check(Style::Plain, 3, &[&[4, 5]]), [], "cannot be told");
        assert_eq!(check(Style::Acks, 3, &[&[0, 4, 5]]), []);
        assert_eq!(check(Style::Acks, 0, &[&[0, 1, 2, 3, 4, 5]]), [Sequence]);
    }

    #[test]
    fn a_device_without_one_may_be_told_again_and_misses_nothing_that_nobody_had() {
        use Breach::{Place, Sequence};
        for style in [Style::Plain, Style::Acks] {
            assert_eq!(check(style, 0, &[&[1, 2], &[2, 3], &[1, 2, 3, 4, 5], &[]]), []);
            assert_eq!(check(style, 0, &[&[1, 2], &[4, 5]]), [Place], "3 was with nobody");
            assert_eq!(check(style, 0, &[&[1, 2, 4, 5]]), [Sequence], "a hole");
            assert_eq!(check(style, 0, &[&[1, 2, 2, 3, 4, 5]]), [Sequence], "twice on one connection");
            assert_eq!(check(style, 0, &[&[1, 2], &[3, 4], &[]]), [Place], "5 never came");
        }
        // Another device has acknowledged message 3 before, or gets it only afterwards.
        for (late_ms, expected) in [(0, vec![]), (300, vec![Place])] {
            let other = Session { device: "r-other".into(), ..session(Style::Acks, late_ms, &[1, 2, 3, 4, 5]) };
            let sessions = [other, session(Style::Plain, 0, &[1, 2]), session(Style::Plain, 200, &[4, 5])];
            let found = breaches(&sessions, &truth(0), &[]);
            assert_eq!(found.into_iter().map(|(breach, _)| breach).collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn nobody_begins_before_what_was_noted() {
        let sessions = [session(Style::Plain, 0, &[1, 2, 3]), session(Style::Plain, 100, &[3, 4, 5])];
        let noted = |at_ms, offset| Noted { at_ms, places: BTreeMap::from([("r".to_owned(), offset)]) };
        assert_eq!(breaches(&sessions, &truth(0), &[noted(50, 20), noted(150, 30)]), []);
        let early = breaches(&sessions, &truth(0), &[noted(50, 20), noted(90, 30)]);
        assert_eq!(early.len(), 1);
        assert_eq!(early[0].0, Breach::Place);
    }

    #[test]
    fn what_is_somebody_elses_and_every_trick_is_found() {
        let good = [Some(1), Some(2), Some(3), Some(4), Some(5)];
        for (trick, breach) in [
            (Trick::Drop, Breach::Sequence),
            (Trick::Duplicate, Breach::Sequence),
            (Trick::Swap, Breach::Sequence),
            (Trick::Leak, Breach::Foreign),
        ] {
            let notebook = Notebook::new(Instant::now(), Some((trick, 3)));
            let other = notebook.open("q-plain", "q", Style::Plain, 0);
            notebook.take(other, Some(name("q", 1)));
            let session = notebook.open("r-cursors", "r", Style::Cursors, 0);
            good.iter().for_each(|number| notebook.take(session, number.map(|number| name("r", number))));
            let found = breaches(&notebook.sessions(), &truth(0), &[]);
            assert!(found.iter().any(|(found, _)| *found == breach), "{trick:?}: {found:?}");
        }
    }
}
