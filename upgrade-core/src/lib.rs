//! Core.
pub mod check;
pub mod context;
pub mod entry;
mod erased;
pub mod error;
pub mod executor;
pub mod graph;
pub mod journal;
pub mod names;
pub mod pipeline;
#[cfg(feature = "file")]
pub mod registry;
pub mod sealed;
pub mod secret;
pub mod step;
pub mod target;
#[cfg(feature = "testkit")]
pub mod testkit;
pub mod transition;
pub mod units;
pub mod verdict;
pub use erased::AnyStep;
