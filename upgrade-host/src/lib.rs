//! Upgrade steps and checks for the machine itself: commands, files, releases, configuration,
//! services, HTTP.

mod archive;
pub mod checks;
pub mod document;
mod error;
mod files;
mod http;
pub mod machine;
mod process;
pub mod steps;
mod text_or_secret;
mod version_text;

use upgrade_core::registry::Registry;

pub use text_or_secret::TextOrSecret;

/// Registers every kind of this crate: `host.*`, `http.*`, `tcp.*`.
pub fn register(registry: &mut Registry) {
    machine::register(registry);
    steps::register(registry);
    checks::register(registry);
}
