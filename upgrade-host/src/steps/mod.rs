//! The kinds of steps, one module each.

pub mod release;

use upgrade_core::registry::Registry;

pub(crate) fn register(registry: &mut Registry) {
    release::register(registry);
}
