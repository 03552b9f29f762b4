//! Tries steps: alone, and in sweeps of crashes, failures and repetitions.

pub mod context;
mod faults;
mod journals;
mod mutation;
mod order;
pub mod sweep;
pub mod toy;
mod tree;

pub use context::TestContext;
pub use journals::AppendThrough;
pub use mutation::Mutation;
pub use order::order_violations;
pub use sweep::{Scenario, Sweep, SweepFailure, SweepReport};
pub use tree::tree;
