//! Arguments and variables that may be empty, as compose files set them.

use std::str::FromStr;

/// Value of an argument or variable. An empty one counts as not given.
#[derive(Debug, Clone)]
pub struct Given<T>(Option<T>);

impl<T: FromStr> FromStr for Given<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, T::Err> {
        Self::parse(text, str::parse)
    }
}

impl<T> Given<T> {
    fn parse<E>(text: &str, parse: impl FnOnce(&str) -> Result<T, E>) -> Result<Self, E> {
        if text.is_empty() { Ok(Self(None)) } else { parse(text).map(|value| Self(Some(value))) }
    }
}

/// Returns the parser of an argument that may be empty.
pub fn or_empty<T, E>(
    parse: fn(&str) -> Result<T, E>,
) -> impl Fn(&str) -> Result<Given<T>, E> + Clone + Send + Sync + 'static
where
    T: 'static,
    E: 'static,
{
    move |text| Given::parse(text, parse)
}

/// Returns the value, if one was given.
pub fn given_value<T: Clone>(given: &Option<Given<T>>) -> Option<T> {
    given.as_ref().and_then(|given| given.0.clone())
}
