//! The kinds of checks, one module each.

mod integrity;

pub use integrity::{Assertion, Compare, ForeignKeys, IntegrityCheck, IntegrityCheckConfig};

use upgrade_core::registry::Registry;

/// Registers every kind of check: its name, what it asks, and how it is made.
pub(crate) fn register(registry: &mut Registry) {
    registry.check(
        "postgres.integrity",
        "Compares what tables hold with what they held before the run",
        IntegrityCheck::from_config,
    );
}
