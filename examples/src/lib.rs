//! What the examples share: a step and a check of one's own.

mod point_link;

pub use point_link::{LeadsTo, PointLink};

/// Tests the code of `docs/own-step.md`.
#[cfg(doctest)]
#[doc = include_str!("../../docs/own-step.md")]
pub mod own_step {}
