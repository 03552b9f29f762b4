//! The history of another tool, taken over: compared with the files, then written into ours.

use std::collections::BTreeSet;
use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sqlx::{AssertSqlSafe, PgConnection};
use upgrade_core::error::StepError;

use super::compare::Drift;
use super::history::{History, HistoryTable};
use super::layout::{Directory, Migration};
use super::version::MigrationVersion;
use crate::error::{Doing, PostgresError};

/// Names a tool whose history can be taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Tool {
    /// Flyway: `flyway_schema_history`, with checksums.
    Flyway,
    /// golang-migrate: `schema_migrations`, which knows the newest version alone.
    GolangMigrate,
    /// diesel: `__diesel_schema_migrations`, without checksums.
    Diesel,
    /// sqlx: `_sqlx_migrations`, with checksums.
    Sqlx,
}

impl fmt::Display for Tool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Tool::Flyway => "flyway",
            Tool::GolangMigrate => "golang-migrate",
            Tool::Diesel => "diesel",
            Tool::Sqlx => "sqlx",
        })
    }
}

impl Tool {
    const ALL: [Self; 4] = [Self::Flyway, Self::GolangMigrate, Self::Diesel, Self::Sqlx];

    fn table(self) -> &'static str {
        match self {
            Tool::Flyway => "flyway_schema_history",
            Tool::GolangMigrate => "schema_migrations",
            Tool::Diesel => "__diesel_schema_migrations",
            Tool::Sqlx => "_sqlx_migrations",
        }
    }

    /// Finds a tool that has a history here, other than the one whose table is used anyway.
    ///
    /// # Errors
    /// The server refused to answer.
    pub async fn with_history(connection: &mut PgConnection, own: HistoryTable) -> Result<Option<Self>, PostgresError> {
        for tool in Self::ALL {
            let same = matches!((tool, own), (Tool::Sqlx, HistoryTable::Sqlx) | (Tool::Diesel, HistoryTable::Diesel));
            if !same && tool.is_there(connection).await? {
                return Ok(Some(tool));
            }
        }
        Ok(None)
    }

    async fn is_there(self, connection: &mut PgConnection) -> Result<bool, PostgresError> {
        // Others have a table of that name too (Rails, dbmate), without the column.
        let column = match self {
            Tool::Flyway => "installed_rank",
            Tool::GolangMigrate => "dirty",
            Tool::Diesel => "run_on",
            Tool::Sqlx => "execution_time",
        };
        sqlx::query_scalar(
            "select exists (select from pg_attribute where attrelid = to_regclass($1) and attname = $2 and not attisdropped)",
        )
        .bind(self.table())
        .bind(column)
        .fetch_one(connection)
        .await
        .doing(|| format!("looking for the history of {self}"))
    }

    /// Reads which migrations of the directory the tool has applied, checksums compared.
    ///
    /// # Errors
    /// There is no such history; a migration failed under the tool; a script is not the one that
    /// was applied, or has no file.
    pub async fn applied(
        self,
        connection: &mut PgConnection,
        directory: &Directory,
        ignore_missing: bool,
    ) -> Result<Vec<MigrationVersion>, PostgresError> {
        if !self.is_there(connection).await? {
            return Err(StepError::permanent(format!("`adopt: {self}`, but there is no {} here", self.table()))
                .with_hint(
                    "correct `adopt`, or the search_path of the target's user; drop it where there is no history",
                )
                .into());
        }
        let mut drift = Vec::new();
        let versions = match self {
            Tool::Flyway => flyway(connection, directory, &mut drift).await?,
            Tool::GolangMigrate => golang_migrate(connection, directory, &mut drift).await?,
            Tool::Diesel | Tool::Sqlx => {
                let kind = if self == Tool::Sqlx { HistoryTable::Sqlx } else { HistoryTable::Diesel };
                same_versions(connection, kind, directory, &mut drift).await?
            }
        };
        let (known, missing): (Vec<_>, Vec<_>) =
            versions.into_iter().partition(|version| directory.find(version).is_some());
        if !ignore_missing {
            drift.extend(missing.into_iter().map(|version| Drift::Missing { version }));
        }
        match super::compare::error_of(&drift) {
            Some(error) => Err(error.into()),
            None => Ok(known),
        }
    }
}

fn changed(migration: &Migration) -> Drift {
    Drift::Changed { file: migration.up.file.clone(), version: migration.version.clone() }
}

fn unreadable(table: &str) -> impl Fn(super::version::VersionError) -> StepError {
    move |error| {
        StepError::permanent(format!("a row of {table} cannot be read")).with_cause(&error).with_hint("look at it")
    }
}

async fn flyway(
    connection: &mut PgConnection,
    directory: &Directory,
    drift: &mut Vec<Drift>,
) -> Result<BTreeSet<MigrationVersion>, PostgresError> {
    let table = Tool::Flyway.table();
    let rows: Vec<(Option<String>, String, Option<i32>, bool)> = sqlx::query_as(AssertSqlSafe(format!(
        "select version, type, checksum, success from {table} order by installed_rank"
    )))
    .fetch_all(connection)
    .await
    .doing(|| "reading Flyway's history".into())?;
    let mut applied = BTreeSet::new();
    for (version, kind, checksum, success) in rows {
        // Schemas that Flyway made and repeatable migrations have no version.
        let Some(version) = version else { continue };
        let version: MigrationVersion = version.parse().map_err(unreadable(table))?;
        if !success {
            drift.push(Drift::Failed { version });
            continue;
        }
        if kind.starts_with("UNDO") || kind == "DELETE" {
            applied.remove(&version);
        } else if kind == "BASELINE" {
            let before = directory.migrations.iter().map(|migration| &migration.version);
            applied.extend(before.filter(|before| **before <= version).cloned());
        } else {
            if let Some(migration) = directory.find(&version)
                && checksum.is_some_and(|checksum| checksum != migration.up.flyway_checksum())
            {
                drift.push(changed(migration));
            }
            applied.insert(version);
        }
    }
    Ok(applied)
}

async fn golang_migrate(
    connection: &mut PgConnection,
    directory: &Directory,
    drift: &mut Vec<Drift>,
) -> Result<BTreeSet<MigrationVersion>, PostgresError> {
    let row: Option<(i64, bool)> = sqlx::query_as("select version, dirty from schema_migrations")
        .fetch_optional(connection)
        .await
        .doing(|| "reading the history of golang-migrate".into())?;
    let Some((newest, dirty)) = row else { return Ok(BTreeSet::new()) };
    let newest = MigrationVersion::number(u64::try_from(newest).unwrap_or_default());
    if dirty {
        drift.push(Drift::Failed { version: newest });
        return Ok(BTreeSet::new());
    }
    let mut applied: BTreeSet<_> = (directory.migrations.iter())
        .map(|migration| migration.version.clone())
        .filter(|version| *version <= newest)
        .collect();
    applied.insert(newest);
    Ok(applied)
}

async fn same_versions(
    connection: &mut PgConnection,
    kind: HistoryTable,
    directory: &Directory,
    drift: &mut Vec<Drift>,
) -> Result<BTreeSet<MigrationVersion>, PostgresError> {
    let history = History::find(&mut *connection, kind, None).await?;
    let rows = history.applied(connection).await?.unwrap_or_default();
    for (version, row) in &rows {
        match directory.find(version) {
            _ if row.failed => drift.push(Drift::Failed { version: version.clone() }),
            Some(migration) if row.checksum.is_some() && kind.checksum(&migration.up) != row.checksum => {
                drift.push(changed(migration));
            }
            _ => {}
        }
    }
    Ok(rows.into_keys().collect())
}
