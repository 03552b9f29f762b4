//! What a run keeps in the database itself: written in the transaction of the effect it speaks of.
//!
//! A connection that breaks in a commit leaves it open whether the effect happened. The row that
//! went with it answers that, after any crash, without guessing. At the end of a run nothing of it
//! is left: rows go with the step that wrote them, the table with its last row.

use std::collections::BTreeMap;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sqlx::types::Json;
use sqlx::{AssertSqlSafe, PgConnection};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use crate::error::{Doing, PostgresError};
use crate::identifier::{Identifier, TableName, literal};
use crate::session::{Session, advisory_key};
use crate::target::Database;

/// Marks a schema as made by a run, so that the last one may remove it.
const MADE_BY_US: &str = "State of upgrades that are under way; removed with the last of them.";

/// Keeps what one step of one run has done, by item.
#[derive(Debug, Clone)]
pub struct Ledger {
    schema: Identifier,
    marker: String,
}

impl Ledger {
    /// Opens the ledger of the step that is called, the same in both directions and on every attempt.
    pub fn of(database: &Database, cx: &Context) -> Self {
        Self { schema: database.state_schema(), marker: cx.marker() }
    }

    /// Returns the schema where the step may keep tables of its own; see [`Ledger::table_name`].
    pub fn schema(&self) -> &Identifier {
        &self.schema
    }

    /// Names a table of the step's own in the schema: the same on every attempt, no other step's.
    pub fn table_name(&self, start: &str) -> TableName {
        TableName::new(self.schema.clone(), Identifier::derived(start, &format!("{} {start}", self.marker)))
    }

    /// Returns the marker under which the step's items are kept.
    pub(crate) fn marker(&self) -> &str {
        &self.marker
    }

    fn table(&self) -> TableName {
        TableName::new(self.schema.clone(), Identifier::new("ledger").expect("a constant is a name"))
    }

    /// Makes schema and table where they are missing; call it before the transaction of the effect.
    ///
    /// # Errors
    /// The user may not create a schema.
    pub async fn ensure(&self, session: &mut Session) -> Result<(), StepError> {
        let (schema, table) = (&self.schema, self.table());
        let there: bool = sqlx::query_scalar("select to_regclass($1) is not null")
            .bind(table.to_string())
            .fetch_one(session.connection())
            .await
            .doing(|| "looking for the ledger".into())?;
        if there {
            return Ok(());
        }
        let key = advisory_key("ledger");
        // Beside another run that makes or removes it: one after the other.
        sqlx::raw_sql(AssertSqlSafe(format!(
            "begin; select pg_advisory_xact_lock({key}); \
             do $do$ begin if to_regnamespace({name}) is null then \
               create schema {schema}; comment on schema {schema} is {comment}; end if; end $do$; \
             create table if not exists {table} (marker text not null, item text not null, value jsonb not null, \
               at timestamptz not null default clock_timestamp(), primary key (marker, item)); \
             commit",
            name = literal(&schema.to_string()),
            comment = literal(MADE_BY_US),
        )))
        .execute(session.connection())
        .await
        .map_err(|error| {
            let error = PostgresError::Sql { doing: format!("making the schema {schema} for what the run keeps"), source: error };
            let denied = error.code() == Some("42501");
            let error = StepError::from(error);
            if denied {
                error.with_hint(
                    "grant CREATE on the database, or make a schema that this user owns and name it: `state_schema` on the target",
                )
            } else {
                error
            }
        })?;
        Ok(())
    }

    /// Writes an item; in the transaction of the effect that it speaks of.
    ///
    /// # Errors
    /// The server refused it.
    pub async fn put(
        &self,
        connection: &mut PgConnection,
        item: &str,
        value: &(impl Serialize + Sync),
    ) -> Result<(), PostgresError> {
        let table = self.table();
        let value = serde_json::to_value(value).map_err(|error| {
            StepError::permanent("what the step keeps cannot be written as JSON").with_cause(&error)
        })?;
        sqlx::query(AssertSqlSafe(format!(
            "insert into {table} (marker, item, value) values ($1, $2, $3) \
             on conflict (marker, item) do update set value = excluded.value, at = excluded.at"
        )))
        .bind(&self.marker)
        .bind(item)
        .bind(Json(value))
        .execute(connection)
        .await
        .doing(|| "writing what the step has done".into())?;
        Ok(())
    }

    /// Reads an item.
    ///
    /// # Errors
    /// The server refused it, or the item has another shape.
    pub async fn get<T: DeserializeOwned>(
        &self,
        connection: &mut PgConnection,
        item: &str,
    ) -> Result<Option<T>, PostgresError> {
        let value = self.all(connection).await?.remove(item);
        let value = value.map(serde_json::from_value).transpose();
        value.map_err(|error| {
            StepError::permanent(format!("what the step kept as {item} cannot be read")).with_cause(&error).into()
        })
    }

    /// Reads every item; none if there is no ledger.
    ///
    /// # Errors
    /// The server refused it.
    pub async fn all(&self, connection: &mut PgConnection) -> Result<BTreeMap<String, Value>, PostgresError> {
        let table = self.table();
        let there: bool = sqlx::query_scalar("select to_regclass($1) is not null")
            .bind(table.to_string())
            .fetch_one(&mut *connection)
            .await
            .doing(|| "looking for the ledger".into())?;
        if !there {
            return Ok(BTreeMap::new());
        }
        let read = sqlx::query_as::<_, (String, Json<Value>)>(AssertSqlSafe(format!(
            "select item, value from {table} where marker = $1"
        )))
        .bind(&self.marker)
        .fetch_all(connection)
        .await;
        match read.doing(|| "reading what the step has done".into()) {
            Ok(rows) => Ok(rows.into_iter().map(|(item, Json(value))| (item, value)).collect()),
            // Another run removed it meanwhile, as it had nothing in it.
            Err(error) if error.code() == Some("42P01") => Ok(BTreeMap::new()),
            Err(error) => Err(error),
        }
    }

    /// Reads an item of every step of the run, each with the step's marker; none if there is no ledger.
    ///
    /// # Errors
    /// The server refused it, or an item has another shape.
    pub(crate) async fn of_run<T: DeserializeOwned>(
        &self,
        connection: &mut PgConnection,
        item: &str,
    ) -> Result<Vec<(String, T)>, PostgresError> {
        let table = self.table();
        let there: bool = sqlx::query_scalar("select to_regclass($1) is not null")
            .bind(table.to_string())
            .fetch_one(&mut *connection)
            .await
            .doing(|| "looking for the ledger".into())?;
        if !there {
            return Ok(Vec::new());
        }
        let run = self.marker.split('/').next().unwrap_or_default();
        let rows: Vec<(String, Json<Value>)> = sqlx::query_as(AssertSqlSafe(format!(
            "select marker, value from {table} where item = $1 and split_part(marker, '/', 1) = $2 order by at"
        )))
        .bind(item)
        .bind(run)
        .fetch_all(connection)
        .await
        .doing(|| "reading what the run has done".into())?;
        let read = rows.into_iter().map(|(marker, Json(value))| {
            let value = serde_json::from_value(value).map_err(|error| {
                StepError::permanent(format!("what step {marker} kept as {item} cannot be read")).with_cause(&error)
            })?;
            Ok((marker, value))
        });
        read.collect()
    }

    /// Takes an item back; in the transaction that undoes the effect it speaks of.
    ///
    /// # Errors
    /// The server refused it.
    pub async fn remove(&self, connection: &mut PgConnection, item: &str) -> Result<(), PostgresError> {
        let table = self.table();
        sqlx::query(AssertSqlSafe(format!("delete from {table} where marker = $1 and item = $2")))
            .bind(&self.marker)
            .bind(item)
            .execute(connection)
            .await
            .doing(|| "taking back what the step has noted".into())?;
        Ok(())
    }

    /// Removes all that the step keeps: its items, the tables that it named, and what is then empty.
    ///
    /// Called by `commit` and at the end of `rollback`; a second call finds nothing.
    ///
    /// # Errors
    /// The server refused it.
    pub async fn clear(&self, session: &mut Session, tables: &[TableName]) -> Result<(), StepError> {
        let (schema, table) = (&self.schema, self.table());
        let key = advisory_key("ledger");
        let drops: String = tables.iter().map(|table| format!("drop table if exists {table}; ")).collect();
        let there: bool = sqlx::query_scalar("select to_regclass($1) is not null")
            .bind(table.to_string())
            .fetch_one(session.connection())
            .await
            .doing(|| "looking for the ledger".into())?;
        let rows = if there {
            format!("delete from {table} where marker = {};", literal(&self.marker))
        } else {
            String::new()
        };
        let sql = format!("begin; select pg_advisory_xact_lock({key}); {drops}{rows} commit");
        sqlx::raw_sql(AssertSqlSafe(sql))
            .execute(session.connection())
            .await
            .doing(|| "removing what the step kept in the database".into())?;
        // Its own transaction, which gives up where another run is at work: that one removes it later.
        let sql = format!(
            "do $do$ begin \
               perform pg_advisory_xact_lock({key}); \
               set local lock_timeout = '20ms'; \
               if to_regclass({name}) is not null then \
                 lock table {table} in access exclusive mode; \
                 if not exists (select from {table}) then drop table {table}; end if; \
               end if; \
               if obj_description(to_regnamespace({schema_name}), 'pg_namespace') = {comment} then \
                 drop schema if exists {schema}; \
               end if; \
             exception when lock_not_available or dependent_objects_still_exist or undefined_table then null; end $do$",
            name = literal(&table.to_string()),
            schema_name = literal(&schema.to_string()),
            comment = literal(MADE_BY_US),
        );
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(session.connection()).await.doing(|| "removing the ledger".into())?;
        Ok(())
    }
}
