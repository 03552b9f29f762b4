//! The kinds of steps, one module each.

mod backfill;
mod sql;

pub use backfill::{Backfill, BackfillConfig, BackfillOutput, BackfillUndo};
pub use sql::{Rows, Sql, SqlConfig, SqlOutput, SqlUndo, UndoableSql};

use upgrade_core::AnyStep;
use upgrade_core::registry::Registry;

/// Registers every kind of step: its name, what it does, and how it is made.
pub(crate) fn register(registry: &mut Registry) {
    registry.step(
        "postgres.backfill",
        "Fills rows in batches beside live traffic, resumable, within a budget",
        |config, cx| Ok(AnyStep::reversible(Backfill::from_config(config, cx)?)),
    );
    registry.step(
        "postgres.sql",
        "Runs a statement, and another one to undo it, each exactly once",
        Sql::any_from_config,
    );
}
