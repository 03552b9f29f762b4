//! The kinds of checks, one module each.

mod integrity;
mod lint;
mod query;
mod version;

pub use integrity::{Assertion, Compare, ForeignKeys, IntegrityCheck, IntegrityCheckConfig};
pub use lint::{LintCheck, LintCheckConfig};
pub use query::{QueryCheck, QueryCheckConfig};
pub use version::{VersionCheck, VersionCheckConfig};

use upgrade_core::registry::Registry;

/// Registers every kind of check: its name, what it asks, and how it is made.
pub(crate) fn register(registry: &mut Registry) {
    registry.check(
        "postgres.integrity",
        "Compares what tables hold with what they held before the run",
        IntegrityCheck::from_config,
    );
    registry.check(
        "postgres.lint",
        "Finds statements of migrations that are dangerous under traffic",
        LintCheck::from_config,
    );
    registry.check("postgres.query", "Asks for one value and holds it to limits", QueryCheck::from_config);
    registry.check("postgres.version", "Asks for the version of the server", VersionCheck::from_config);
}
