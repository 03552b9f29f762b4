//! The kinds of steps, one module each.

use upgrade_core::registry::Registry;

pub mod config;
pub mod file;

pub(crate) fn register(registry: &mut Registry) {
    config::register(registry);
    file::register(registry);
}
