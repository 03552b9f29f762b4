//! The kinds of steps, one module each.

mod expand;
mod sql;

pub use expand::{
    AddColumn, Expand, ExpandConfig, ExpandOutput, ExpandUndo, NotNullColumn, RenameColumn, RetypeColumn,
};
pub use sql::{Rows, Sql, SqlConfig, SqlOutput, SqlUndo, UndoableSql};

use upgrade_core::registry::Registry;

/// Registers every kind of step: its name, what it does, and how it is made.
pub(crate) fn register(registry: &mut Registry) {
    registry.step(
        "postgres.expand",
        "Changes a column in two shapes that stay in step until commit",
        Expand::any_from_config,
    );
    registry.step(
        "postgres.sql",
        "Runs a statement, and another one to undo it, each exactly once",
        Sql::any_from_config,
    );
}
