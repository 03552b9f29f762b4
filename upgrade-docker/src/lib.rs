//! Upgrade steps and checks for Docker Engine and Compose.
//!
//! The crate is laid out as every adapter is: one file a step kind in `steps/`, one file a check
//! kind in `checks/`, and [`register`], which makes them known to pipeline files. It has no kinds
//! yet.

mod checks;
mod steps;

use upgrade_core::registry::Registry;

/// Registers every kind of this crate: `docker.*`.
pub fn register(registry: &mut Registry) {
    steps::register(registry);
    checks::register(registry);
}
