//! Upgrade steps and checks for the machine itself: commands, files, releases, configuration,
//! services, HTTP.

pub mod checks;
pub mod config;
mod durable;
pub mod machine;
mod masked_diff;
pub mod ownership;
pub mod path_state;
pub mod steps;
pub mod swap;
pub mod template;

use upgrade_core::registry::Registry;

/// Registers every kind of this crate: `host.*`, `http.*`, `tcp.*`.
pub fn register(registry: &mut Registry) {
    steps::register(registry);
    checks::register(registry);
}
