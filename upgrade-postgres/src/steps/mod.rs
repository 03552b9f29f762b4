//! The kinds of steps, one module each.

mod backfill;
mod backup;
mod expand;
mod foreign_key;
mod index;
mod restore;
mod sql;
pub(crate) mod migrate;
pub(crate) mod writes;

pub use backfill::{Backfill, BackfillConfig, BackfillOutput, BackfillUndo};
pub use backup::{Backup, BackupConfig, BackupOutput, BackupUndo, Method, OnRollback};
pub use expand::{
    AddColumn, Expand, ExpandConfig, ExpandOutput, ExpandUndo, NotNullColumn, RenameColumn, RetypeColumn,
};
pub use foreign_key::{Action, ForeignKey, ForeignKeyConfig, ForeignKeyOutput, ForeignKeyUndo, References, Unindexed};
pub use index::{DetailedIndexKey, Index, IndexConfig, IndexKey, IndexOutput, IndexPresence, IndexUndo, Nulls, Order};
pub use migrate::{
    Migrate, MigrateConfig, MigrateOutput, MigrateUndo, Preset, Runner, RunnerConfig, RunnerOutput, RunnerUndo, UndoBy,
};
pub use restore::{Restore, RestoreConfig, RestoreOutput, RestoreUndo};
pub use sql::{Rows, Sql, SqlConfig, SqlOutput, SqlUndo, UndoableSql};
pub use writes::{Writes, WritesConfig, WritesOutput, WritesState, WritesUndo};
pub(crate) use backup::may_create;

use upgrade_core::AnyStep;
use upgrade_core::registry::{BuildContext, BuildError, Registry};
use upgrade_core::step::Rollback;

/// Registers every kind of step: its name, what it does, and how it is made.
pub(crate) fn register(registry: &mut Registry) {
    registry
        .step(
        "postgres.backfill",
        "Fills rows in batches beside live traffic, resumable, within a budget",
        |config, cx| Ok(AnyStep::reversible(Backfill::from_config(config, cx)?)),
    )
        .step(
            "postgres.backup",
            "Keeps a database, or a part of it, in a directory that proves itself",
            reversible(Backup::from_config),
        )
        .step(
            "postgres.expand",
            "Changes a column in two shapes that stay in step until commit",
            Expand::any_from_config,
        )
        .step(
            "postgres.foreign_key",
            "Adds a foreign key without holding up writes",
            reversible(ForeignKey::from_config),
        )
        .step("postgres.index", "Builds an index beside live traffic, or drops one", reversible(Index::from_config))
        .step(
            "postgres.migrate",
            "Applies the migrations of a directory, and takes back exactly what it applied",
            Migrate::any_from_config,
        )
        .step(
            "postgres.restore",
            "Puts what a backup holds in the place of a database, which is kept until commit",
            reversible(Restore::from_config),
        )
        .step(
        "postgres.sql",
        "Runs a statement, and another one to undo it, each exactly once",
        Sql::any_from_config,
    )
        .step("postgres.writes", "Stops the writes of everybody else, and allows them again", |config, cx| {
            Writes::from_config(config, cx).map(AnyStep::reversible)
        });
}

fn reversible<C, S: Rollback>(
    make: fn(C, &BuildContext) -> Result<S, BuildError>,
) -> impl Fn(C, &BuildContext) -> Result<AnyStep, BuildError> {
    move |config, cx| make(config, cx).map(AnyStep::reversible)
}
