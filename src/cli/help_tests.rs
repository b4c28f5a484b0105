//! Tests of the help of every command.

use clap::{Command, CommandFactory};

use super::Cli;

/// Passes every command with its full name to `check`.
fn each(command: &Command, name: &str, check: &mut impl FnMut(&str, &Command)) {
    check(name, command);
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
        each(sub, &format!("{name} {}", sub.get_name()), check);
    }
}

#[test]
fn the_help_of_every_command_fits_into_80_and_120_columns() {
    for width in [80, 120] {
        let mut command = Cli::command().term_width(width);
        command.build();
        let mut longest = 0;
        each(&command, "postrider", &mut |name, command| {
            let mut command = command.clone();
            for help in [command.render_help().to_string(), command.render_long_help().to_string()] {
                for line in help.lines() {
                    let length = line.trim_end().chars().count();
                    assert!(length <= width, "{name}: {length} characters in `{line}`");
                    longest = longest.max(length);
                }
            }
        });
        assert!(longest > width - 8, "the width is used: {longest} of {width}");
    }
}

#[test]
fn options_of_all_commands_are_in_groups_and_examples_are_not_broken() {
    let mut command = Cli::command().term_width(80);
    command.build();
    let mut commands = 0;
    each(&command, "postrider", &mut |name, command| {
        commands += 1;
        for id in ["config", "set"] {
            let option = command.get_arguments().find(|argument| argument.get_id() == id);
            assert_eq!(option.and_then(clap::Arg::get_help_heading), Some("Configuration"), "{name} {id}");
        }
        let help = command.clone().render_long_help().to_string();
        for line in command.get_after_help().map(ToString::to_string).unwrap_or_default().lines() {
            let is_example = line.starts_with("  ");
            assert!(!is_example || help.contains(line.trim_end()), "{name}: `{line}` is broken");
        }
    });
    assert!(commands > 25, "{commands}");
}
