//! The kinds of steps, one module each.

pub mod backup;
pub mod release;
pub mod restore;

use upgrade_core::registry::Registry;

pub(crate) fn register(registry: &mut Registry) {
    backup::register(registry);
    release::register(registry);
    restore::register(registry);
}
