//! The kinds of checks, one module each.

use upgrade_core::registry::Registry;

pub mod config;

pub(crate) fn register(registry: &mut Registry) {
    config::register(registry);
}
