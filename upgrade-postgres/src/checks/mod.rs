//! The kinds of checks, one module each.

mod backup_fresh;
mod health;
mod integrity;
mod lint;
mod migrations;
mod query;
mod version;

pub use backup_fresh::{BackupFreshCheck, BackupFreshCheckConfig, Verify};
pub use health::{HealthCheck, HealthCheckConfig};
pub use integrity::{Assertion, Compare, ForeignKeys, IntegrityCheck, IntegrityCheckConfig};
pub use lint::{LintCheck, LintCheckConfig};
pub use migrations::{MigrationsCheck, MigrationsCheckConfig, PendingPolicy};
pub use query::{QueryCheck, QueryCheckConfig};
pub use version::{VersionCheck, VersionCheckConfig};

use upgrade_core::registry::Registry;

/// Registers every kind of check: its name, what it asks, and how it is made.
pub(crate) fn register(registry: &mut Registry) {
    registry
        .check(
            "postgres.backup_fresh",
            "Asks for a backup of the database that is recent and whole",
            BackupFreshCheck::from_config,
        )
        .check(
            "postgres.health",
            "Measures connections, transactions, replication, and what is worn or near its end",
            HealthCheck::from_config,
        )
        .check(
            "postgres.integrity",
            "Compares what tables hold with what they held before the run",
            IntegrityCheck::from_config,
        )
        .check(
            "postgres.lint",
            "Finds statements of migrations that are dangerous under traffic",
            LintCheck::from_config,
        )
        .check(
            "postgres.migrations",
            "Asks whether migrations and their history agree, and whether any are pending",
            MigrationsCheck::from_config,
        )
        .check("postgres.query", "Asks for one value and holds it to limits", QueryCheck::from_config)
        .check("postgres.version", "Asks for the version of the server", VersionCheck::from_config);
}
