//! Tries steps: alone, and in sweeps of crashes, failures and repetitions.

pub mod context;
#[cfg(feature = "file")]
mod documentation;
mod faults;
mod journals;
mod mutation;
mod order;
pub mod sweep;
pub mod toy;
mod tree;

pub use context::TestContext;
#[cfg(feature = "file")]
pub use documentation::Pages;
pub use journals::AppendThrough;
pub use mutation::Mutation;
pub use order::order_violations;
pub use sweep::{Scenario, Sweep, SweepFailure, SweepReport};
pub use tree::tree;
