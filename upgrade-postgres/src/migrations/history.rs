//! The table that says which migrations a database has.
//!
//! For the layout of sqlx and that of diesel it is their own, to the byte: the service's own
//! migrator finds everything applied, and the other way round. Else it is ours.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use sqlx::{AssertSqlSafe, PgConnection, Row as _};
use upgrade_core::error::StepError;

use super::layout::Layout;
use super::script::Script;
use super::version::MigrationVersion;
use crate::error::{Doing, PostgresError};
use crate::identifier::{Identifier, TableName, literal};

/// Names whose table it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HistoryTable {
    /// `_sqlx_migrations`.
    Sqlx,
    /// `__diesel_schema_migrations`.
    Diesel,
    /// `_upgrade_migrations`, which also keeps the down scripts.
    Own,
}

impl HistoryTable {
    /// Returns whose table goes with a layout.
    pub fn of(layout: Layout) -> Self {
        match layout {
            Layout::Sqlx => Self::Sqlx,
            Layout::Diesel => Self::Diesel,
            Layout::GolangMigrate | Layout::Flyway => Self::Own,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Sqlx => "_sqlx_migrations",
            Self::Diesel => "__diesel_schema_migrations",
            Self::Own => "_upgrade_migrations",
        }
    }

    /// Digests a script as the table keeps it; diesel keeps nothing of it.
    pub fn checksum(self, script: &Script) -> Option<String> {
        match self {
            Self::Sqlx => Some(script.sha384()),
            Self::Own => Some(script.sha256()),
            Self::Diesel => None,
        }
    }
}

/// Holds what the table says of one migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// The digest of the script that was applied, where the table keeps one.
    pub checksum: Option<String>,
    /// Whether another tool left it half done.
    pub failed: bool,
    /// Its name, where the table keeps it.
    pub description: String,
    /// The down script that went with it, where the table keeps it.
    pub down: Option<Script>,
}

/// Holds the row to write for a migration.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    /// Its version.
    pub version: &'a MigrationVersion,
    /// Its name.
    pub description: &'a str,
    /// The digest of its script.
    pub checksum: Option<&'a str>,
    /// Its down script, for the table that keeps it.
    pub down: Option<&'a str>,
}

/// Names the table of one database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// Whose table it is.
    pub kind: HistoryTable,
    /// Its name, with the schema where it is or will be.
    pub table: TableName,
}

impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from(self.table.clone()))
    }
}

impl History {
    /// Finds the table as its tool would: on the search path, else where it would be made.
    ///
    /// # Errors
    /// The server refused to answer.
    pub async fn find(
        connection: &mut PgConnection,
        kind: HistoryTable,
        named: Option<&TableName>,
    ) -> Result<Self, PostgresError> {
        if let Some(table) = named {
            return Ok(Self { kind, table: table.clone() });
        }
        let name = kind.name();
        let schema: String = sqlx::query_scalar(
            "select coalesce((select relnamespace::regnamespace::text from pg_class where oid = to_regclass($1)), \
             quote_ident(current_schema()), 'public')",
        )
        .bind(name)
        .fetch_one(connection)
        .await
        .doing(|| format!("looking for {name}"))?;
        let table = format!("{schema}.{name}").parse::<TableName>();
        let table = table.map_err(|error| StepError::permanent("the schema has no usable name").with_cause(&error))?;
        Ok(Self { kind, table })
    }

    /// Reads all that was applied; `None` if there is no table.
    ///
    /// # Errors
    /// The server refused it, or a row holds no version.
    pub async fn applied(
        &self,
        connection: &mut PgConnection,
    ) -> Result<Option<BTreeMap<MigrationVersion, Applied>>, PostgresError> {
        let table = &self.table;
        let columns = match self.kind {
            HistoryTable::Sqlx => "version::text, encode(checksum, 'hex'), not success, description, null::text",
            HistoryTable::Diesel => "version::text, null::text, false, ''::text, null::text",
            HistoryTable::Own => "version, checksum, false, description, down",
        };
        let read = sqlx::query(AssertSqlSafe(format!("select {columns} from {table}"))).fetch_all(connection).await;
        let rows = match read.doing(|| format!("reading the history of migrations in {self}")) {
            Ok(rows) => rows,
            Err(error) if matches!(error.code(), Some("42P01" | "3F000")) => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut applied = BTreeMap::new();
        for row in rows {
            let version: String = row.try_get(0)?;
            let version: MigrationVersion = version.parse().map_err(|error| {
                StepError::permanent(format!("a row of {self} cannot be read"))
                    .with_cause(&error)
                    .with_hint("look at that table: is it the history that `layout` says?")
            })?;
            let down: Option<String> = row.try_get(4)?;
            let down = down.map(|text| Script::new(format!("the down script kept in {self} for {version}"), text));
            let row =
                Applied { checksum: row.try_get(1)?, failed: row.try_get(2)?, description: row.try_get(3)?, down };
            applied.insert(version, row);
        }
        Ok(Some(applied))
    }

    /// Writes the statement that makes the table, as its tool would.
    pub fn create(&self) -> String {
        let table = &self.table;
        match self.kind {
            HistoryTable::Sqlx => format!(
                "create table {table} (version bigint primary key, description text not null, \
                 installed_on timestamptz not null default now(), success boolean not null, \
                 checksum bytea not null, execution_time bigint not null)"
            ),
            HistoryTable::Diesel => format!(
                "create table {table} (version varchar(50) primary key not null, \
                 run_on timestamp not null default current_timestamp)"
            ),
            HistoryTable::Own => format!(
                "create table {table} (version text primary key, description text not null, checksum text not null, \
                 down text, applied_at timestamptz not null default now())"
            ),
        }
    }

    /// Writes the statement that adds a row.
    pub fn insert(&self, row: Row<'_>) -> String {
        let table = &self.table;
        let (version, description) = (literal(row.version.as_str()), literal(row.description));
        let checksum = row.checksum.unwrap_or_default();
        match self.kind {
            HistoryTable::Sqlx => format!(
                "insert into {table} (version, description, success, checksum, execution_time) values \
                 ({version}::bigint, {description}, true, decode('{checksum}', 'hex'), \
                 (extract(epoch from clock_timestamp() - transaction_timestamp()) * 1e9)::bigint)"
            ),
            HistoryTable::Diesel => format!("insert into {table} (version) values ({version})"),
            HistoryTable::Own => {
                let down = row.down.map_or_else(|| "null".to_owned(), literal);
                format!(
                    "insert into {table} (version, description, checksum, down) values \
                     ({version}, {description}, '{checksum}', {down})"
                )
            }
        }
    }

    /// Writes the statement that takes a row away, or fails where it is not there.
    pub fn delete(&self, version: &MigrationVersion) -> String {
        let (table, version) = (&self.table, literal(version.as_str()));
        match self.kind {
            HistoryTable::Sqlx => format!("delete from {table} where version = {version}::bigint"),
            _ => format!("delete from {table} where version = {version}"),
        }
    }

    /// Names the schema.
    pub fn schema(&self) -> &Identifier {
        &self.table.schema
    }
}
