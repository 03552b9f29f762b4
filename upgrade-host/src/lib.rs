//! Upgrade steps and checks for the machine itself: commands, files, releases, configuration,
//! services, HTTP.

mod archive;
pub mod checks;
mod durable;
pub mod machine;
pub mod steps;

use upgrade_core::registry::Registry;

/// Registers every kind of this crate: `host.*`, `http.*`, `tcp.*`.
pub fn register(registry: &mut Registry) {
    steps::register(registry);
    checks::register(registry);
}
