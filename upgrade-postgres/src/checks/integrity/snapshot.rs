//! What tables hold, as it is remembered from before the run.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use super::{Compare, IntegrityCheckConfig};
use crate::error::{Doing, PostgresError};
use crate::fingerprint::{columns, fingerprints, tables};
use crate::identifier::{Identifier, TableName};

/// Begins the name of a fact about a table.
pub(super) const TABLE: &str = "table ";

/// Remembers what one table held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Contents {
    pub(super) rows: i64,
    /// Absent where only the number of rows is compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) digest: Option<String>,
    pub(super) columns: Vec<String>,
}

impl Contents {
    pub(super) fn to_text(&self) -> String {
        serde_json::to_string(self).expect("texts and numbers are JSON")
    }
}

/// What was read now.
pub(super) struct Read {
    pub(super) tables: BTreeMap<TableName, Contents>,
    pub(super) names: Vec<TableName>,
}

/// Returns what was read before the run.
pub(super) fn before(cx: &Context) -> Result<BTreeMap<TableName, Contents>, StepError> {
    let facts = cx.baseline_facts().iter().filter_map(|(name, text)| Some((name.strip_prefix(TABLE)?, text)));
    let read = facts.map(|(name, text)| {
        let wrong = || StepError::permanent(format!("what was read of {name} before the run cannot be read"));
        let table = name.parse().map_err(|_| wrong())?;
        Ok((table, serde_json::from_str(text).map_err(|error| wrong().with_cause(&error))?))
    });
    read.collect()
}

/// Reads the tables: the columns that they had before the run, as far as they are still there.
pub(super) async fn read(
    connection: &mut PgConnection,
    config: &IntegrityCheckConfig,
    state_schema: &Identifier,
    before: &BTreeMap<TableName, Contents>,
    cx: &Context,
) -> Result<Read, PostgresError> {
    let mut names = match &config.tables {
        Some(tables) => tables.clone(),
        None => tables(connection, &config.schemas, std::slice::from_ref(state_schema)).await?,
    };
    names.retain(|table| !config.ignore.contains(table));
    let (mut present, mut excluded) = (BTreeMap::new(), BTreeMap::new());
    for table in &names {
        let Some(found) = columns(connection, table).await? else {
            // After the run it is a finding that a table is gone; before it, a mistake of the pipeline's.
            if cx.is_baseline() {
                return Err(StepError::permanent(format!("there is no table {table}"))
                    .with_hint("check the names in `tables`; without a schema a table is looked for in `public`")
                    .into());
            }
            continue;
        };
        let ignored = config.ignore_columns.get(table).map_or(&[][..], Vec::as_slice);
        if cx.is_baseline()
            && let Some(unknown) = ignored.iter().find(|column| !found.contains(column))
        {
            return Err(StepError::permanent(format!("table {table} has no column {unknown}"))
                .with_hint("correct `ignore_columns`")
                .into());
        }
        // One that the upgrade has added says nothing about what was there before.
        let added = |column: &Identifier| {
            before.get(table).is_some_and(|was| !was.columns.iter().any(|name| name == column.as_str()))
        };
        let left_out: Vec<_> =
            found.iter().filter(|column| ignored.contains(column) || added(column)).cloned().collect();
        excluded.insert(table.clone(), left_out);
        let counted = found.into_iter().filter(|column| !ignored.contains(column)).map(String::from);
        present.insert(table.clone(), counted.collect::<Vec<_>>());
    }
    names.retain(|table| present.contains_key(table));
    let mut read = BTreeMap::new();
    match config.compare {
        Compare::Contents => {
            let total = Some(names.len() as u64);
            for (done, table) in names.iter().enumerate() {
                cx.progress(done as u64, total, format!("reading {table}"));
                let one = fingerprints(connection, std::slice::from_ref(table), &excluded).await?;
                for (table, fingerprint) in one {
                    let columns = present[&table].clone();
                    let contents = Contents { rows: fingerprint.rows, digest: Some(fingerprint.digest), columns };
                    read.insert(table, contents);
                }
            }
        }
        Compare::Rows => {
            for table in &names {
                let sql = format!("select count(*) from {table}");
                let rows = sqlx::query_scalar(sqlx::AssertSqlSafe(sql))
                    .fetch_one(&mut *connection)
                    .await
                    .doing(|| format!("counting the rows of {table}"))?;
                read.insert(table.clone(), Contents { rows, digest: None, columns: present[table].clone() });
            }
        }
    }
    Ok(Read { tables: read, names })
}
