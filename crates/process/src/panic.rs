//! Containment of panics that libraries are expected to raise.

use std::{
    cell::Cell,
    panic::{self, AssertUnwindSafe, catch_unwind},
    sync::Once,
};

thread_local! {
    static EXPECTED: Cell<bool> = const { Cell::new(false) };
}

/// Calls a function that may panic; returns `None` if it did. The panic is not printed: the caller
/// handles it.
pub fn contain<T>(call: impl FnOnce() -> T) -> Option<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !EXPECTED.get() {
                usual(info);
            }
        }));
    });
    EXPECTED.set(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    EXPECTED.set(false);
    result.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_contained_panic_is_none_and_does_not_affect_the_next_call() {
        assert_eq!(contain(|| -> u8 { panic!("expected") }), None);
        assert_eq!(contain(|| 1), Some(1));
        assert!(!EXPECTED.get());
    }
}
