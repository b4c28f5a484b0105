//! Flags with one dash, as the Go program accepts them that `postrider relay` replaces.

use std::ffi::OsString;

use clap::CommandFactory;

use super::Cli;

/// Adds the second dash to flags of `relay` that have only one, as Go programs accept them:
/// `-broker x`, `-target-url=x`. Arguments of other commands stay unchanged.
pub fn with_two_dashes(arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = arguments.collect();
    let Some(command) = command_at(&arguments).filter(|&at| arguments[at] == "relay") else { return arguments };
    let known: Vec<String> = Cli::command()
        .find_subcommand("relay")
        .map(|relay| relay.get_arguments().filter_map(|argument| argument.get_long().map(str::to_owned)).collect())
        .unwrap_or_default();
    for argument in arguments.iter_mut().skip(command + 1).take_while(|argument| *argument != "--") {
        let Some(text) = argument.to_str() else { continue };
        let name = text.strip_prefix('-').map(|rest| rest.split('=').next().unwrap_or(rest));
        if name.is_some_and(|name| known.iter().any(|flag| flag == name)) {
            *argument = format!("-{text}").into();
        }
    }
    arguments
}

/// Returns where the name of the command is: before it there are only flags of all commands.
fn command_at(arguments: &[OsString]) -> Option<usize> {
    let mut at = 1;
    loop {
        let text = arguments.get(at)?.to_str()?;
        match text {
            "--config" | "--set" => at += 2,
            _ if text.starts_with('-') => at += 1,
            _ => return Some(at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_commands_and_unknown_flags_keep_their_dashes() {
        let same = |arguments: &[&str]| {
            let arguments: Vec<OsString> = arguments.iter().map(|argument| OsString::from(*argument)).collect();
            assert_eq!(with_two_dashes(arguments.clone().into_iter()), arguments);
        };
        same(&["postrider", "run", "-topic", "x"]);
        same(&["postrider", "relay", "-h", "-x", "-topics", "---topic", "-"]);
        same(&["postrider", "relay", "--", "-topic"]);
        same(&["postrider", "produce", "relay", "-topic", "-rate"]);
        same(&["postrider", "--set", "relay", "produce", "t", "-rate"]);
        let after_flags = ["postrider", "--config", "f", "--set=a=b", "relay", "-topic", "t"].map(OsString::from);
        assert_eq!(with_two_dashes(after_flags.into_iter())[5], "--topic");
    }
}
