//! Checker: a receiver gets all of its messages, in order, and no other receiver's.

use std::collections::HashMap;

use serde_json::{Value, json};

/// Returns a message as it is sent, and as a plain client gets it.
pub fn message(receiver: &str, sender: &str, number: usize) -> Value {
    json!({"chatId": "c", "senderId": sender, "receiverId": receiver, "content": number.to_string()})
}

/// The number of times that a message may arrive.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Times {
    Once,
    /// After a reconnect, unacknowledged messages may arrive again.
    OnceOrMore,
}

/// Returns the faults in the messages that a receiver got, given the acknowledged ones.
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
        // Another receiver's message replaces an own one.
        assert_eq!(check(&[("r", 1), ("q", 2), ("r", 3)], Times::Once), ["leaked", "lost"]);
    }
}
