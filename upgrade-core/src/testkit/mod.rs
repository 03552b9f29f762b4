//! Tries steps and checks without a run around them.

pub mod context;

pub use context::TestContext;
