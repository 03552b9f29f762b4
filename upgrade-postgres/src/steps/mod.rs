//! The kinds of steps, one module each.

mod sql;
pub(crate) mod writes;

pub use sql::{Rows, Sql, SqlConfig, SqlOutput, SqlUndo, UndoableSql};
pub use writes::{Writes, WritesConfig, WritesOutput, WritesState, WritesUndo};

use upgrade_core::AnyStep;
use upgrade_core::registry::Registry;

/// Registers every kind of step: its name, what it does, and how it is made.
pub(crate) fn register(registry: &mut Registry) {
    registry.step(
        "postgres.sql",
        "Runs a statement, and another one to undo it, each exactly once",
        Sql::any_from_config,
    );
    registry.step("postgres.writes", "Stops the writes of everybody else, and allows them again", |config, cx| {
        Writes::from_config(config, cx).map(AnyStep::reversible)
    });
}
