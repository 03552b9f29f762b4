//! Upgrade steps and checks for the machine itself: commands, files, releases, configuration,
//! services, HTTP.

mod archive;
pub mod checks;
pub mod config;
mod durable;
mod http_request;
mod leftovers;
pub mod machine;
mod masked_diff;
pub mod ownership;
pub mod path_state;
mod process;
mod service_control;
pub mod steps;
pub mod swap;
pub mod template;
pub mod text_or_secret;
mod version_text;

use upgrade_core::registry::Registry;

/// Registers every kind of this crate: `host.*`, `http.*`, `tcp.*`.
pub fn register(registry: &mut Registry) {
    machine::register(registry);
    steps::register(registry);
    checks::register(registry);
}
