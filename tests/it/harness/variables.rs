//! Environment variables that repeat or lengthen a test.

/// Returns whether tests may take minutes, as in `make test-long`.
pub fn long() -> bool {
    text("POSTRIDER_LONG_TESTS").is_some()
}

/// Returns the seed in a variable, or a random one.
pub fn seed(name: &str) -> u64 {
    number(name).unwrap_or_else(|| fastrand::u64(..))
}

/// Returns the value of a variable; `None` if it is unset or empty.
pub fn text(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|text| !text.is_empty())
}

/// Returns the number in a variable; panics if it is not a number.
pub fn number(name: &str) -> Option<u64> {
    text(name).map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is {text}")))
}
