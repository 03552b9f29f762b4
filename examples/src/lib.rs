//! Runnable examples of every use of the upgrade crates, and the tests of the code in `docs/`.

/// Tests the code of `docs/own-step.md`.
#[cfg(doctest)]
#[doc = include_str!("../../docs/own-step.md")]
pub mod own_step {}
