//! Variables by which whoever runs a test repeats or lengthens it.

/// Whether tests may take minutes, as in `make test-long`.
pub fn long() -> bool {
    text("POSTRIDER_LONG_TESTS").is_some()
}

/// A seed: the variable's, or a new one.
pub fn seed(name: &str) -> u64 {
    number(name).unwrap_or_else(|| fastrand::u64(..))
}

/// What a variable says; an empty one says nothing.
pub fn text(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|text| !text.is_empty())
}

/// The same where it must be a number.
pub fn number(name: &str) -> Option<u64> {
    text(name).map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is {text}")))
}
