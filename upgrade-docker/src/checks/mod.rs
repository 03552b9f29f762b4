//! The kinds of checks, one module each.

use upgrade_core::registry::Registry;

pub(crate) fn register(_registry: &mut Registry) {}
