//! The kinds of checks, one module each.

mod backup_fresh;

pub use backup_fresh::{BackupFreshCheck, BackupFreshCheckConfig, Verify};

use upgrade_core::registry::Registry;

/// Registers every kind of check: its name, what it asks, and how it is made.
pub(crate) fn register(registry: &mut Registry) {
    registry.check(
        "postgres.backup_fresh",
        "Asks for a backup of the database that is recent and whole",
        BackupFreshCheck::from_config,
    );
}
