//! Parses headers given on the command line.

use std::ffi::OsStr;

use clap::{Arg, Command, builder::TypedValueParser, error::ErrorKind};

/// Parser of an argument. Its error does not print the header, whose value may be a token.
#[derive(Clone)]
pub struct Parser;

impl TypedValueParser for Parser {
    type Value = (String, String);

    fn parse_ref(&self, command: &Command, _: Option<&Arg>, value: &OsStr) -> Result<Self::Value, clap::Error> {
        parse(&value.to_string_lossy()).map_err(|error| {
            clap::Error::raw(ErrorKind::ValueValidation, format!("invalid value for '--header': {error}\n"))
                .with_cmd(command)
        })
    }
}

/// The error of a header that cannot be split into name and value.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("a header needs a colon between name and value, as in `authorization: Bearer abc`")]
    NoColon,
    #[error("a header needs a name before the colon")]
    NoName,
}

/// Splits `Name: value` at its first colon.
fn parse(text: &str) -> Result<(String, String), Error> {
    let (name, value) = text.split_once(':').ok_or(Error::NoColon)?;
    if name.trim().is_empty() {
        return Err(Error::NoName);
    }
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_split_at_its_first_colon_and_refused_without_one() {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(parse("X-A: b:c").unwrap(), pair("X-A", "b:c"));
        assert_eq!(parse("Y:").unwrap(), pair("Y", ""));
        for text in ["nocolon", "", " : value", ":"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
