//! The kinds of checks, one module each.

pub mod backup;

use upgrade_core::registry::Registry;

pub(crate) fn register(registry: &mut Registry) {
    backup::register(registry);
}
