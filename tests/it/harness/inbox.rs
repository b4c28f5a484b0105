//! The checker of "a receiver sees its own messages, all of them, in order, and no one else's".

use std::collections::HashMap;

use serde_json::{Value, json};

/// A message as it is sent, and as a plain client gets it.
pub fn message(receiver: &str, sender: &str, number: usize) -> Value {
    json!({"chatId": "c", "senderId": sender, "receiverId": receiver, "content": number.to_string()})
}

/// How often a message may come.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Times {
    Once,
    /// Again after a reconnect: what was not known to have arrived.
    OnceOrMore,
}

/// What is wrong with what a receiver got, given what its senders were told is sent.
pub fn faults(receiver: &str, sent: &[Value], got: &[Value], times: Times) -> Vec<String> {
    let mut faults = Vec::new();
    let mut seen: HashMap<String, usize> = HashMap::new();
    let mut last: HashMap<&str, u64> = HashMap::new();
    for message in got {
        if message["receiverId"] != receiver {
            faults.push(format!("leaked: {message}"));
        }
        let count = seen.entry(message.to_string()).or_default();
        *count += 1;
        if *count > 1 {
            if times == Times::Once {
                faults.push(format!("doubled: {message}"));
            }
            continue;
        }
        let sender = message["senderId"].as_str().unwrap_or("?");
        let number = message["content"].as_str().and_then(|text| text.parse().ok()).unwrap_or(0);
        if let Some(before) = last.insert(sender, number).filter(|&before| before >= number) {
            faults.push(format!("disordered: {sender} {number} after {before}"));
        }
    }
    faults.extend(
        sent.iter()
            .filter(|message| !seen.contains_key(&message.to_string()))
            .map(|message| format!("lost: {message}")),
    );
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(got: &[(&str, usize)], times: Times) -> Vec<String> {
        let sent: Vec<Value> = (1..=3).map(|number| message("r", "s", number)).collect();
        let got: Vec<Value> = got.iter().map(|(receiver, number)| message(receiver, "s", *number)).collect();
        faults("r", &sent, &got, times).iter().map(|fault| fault.split(':').next().unwrap().to_owned()).collect()
    }

    #[test]
    fn every_fault_that_it_exists_for_is_found() {
        let none: [&str; 0] = [];
        assert_eq!(check(&[("r", 1), ("r", 2), ("r", 3)], Times::Once), none);
        assert_eq!(check(&[("r", 1), ("r", 3)], Times::Once), ["lost"]);
        assert_eq!(check(&[("r", 1), ("r", 3), ("r", 2)], Times::Once), ["disordered"]);
        assert_eq!(check(&[("r", 1), ("r", 2), ("r", 2), ("r", 3)], Times::Once), ["doubled"]);
        assert_eq!(check(&[("r", 1), ("r", 2), ("r", 1), ("r", 2), ("r", 3)], Times::OnceOrMore), none);
        assert_eq!(check(&[("r", 1), ("r", 2), ("r", 3), ("q", 4)], Times::Once), ["leaked"]);
        // One for one: another's message in the place of an own one.
        assert_eq!(check(&[("r", 1), ("q", 2), ("r", 3)], Times::Once), ["leaked", "lost"]);
    }
}
