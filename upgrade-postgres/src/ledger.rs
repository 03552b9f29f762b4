//! What a run keeps in the database itself: written in the transaction of the effect it speaks of.
//!
//! A connection that breaks in a commit leaves it open whether the effect happened. The row that
//! went with it answers that, after any crash, without guessing. At the end of a run nothing of it
//! is left: rows go with the step that wrote them, the table with its last row.

use std::collections::BTreeMap;
use std::time::Duration;

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

/// Marks a schema or table as made by a run, so that the last one may remove it.
pub(crate) const MADE_BY_US: &str = "State of upgrades that are under way; removed with the last of them.";

/// The item that keeps the table where it is while a step is under way: other runs remove an empty one.
const UNDER_WAY: &str = "";

/// How long an empty table that somebody reads (a vacuum, a backup) is tried to be removed.
const REMOVING: Duration = Duration::from_secs(5);

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

    /// Makes schema and table where they are missing, and keeps them there until [`Ledger::clear`];
    /// call it before the transaction of the effect.
    ///
    /// # Errors
    /// The user may not create a schema, or the schema has a table of that name that is not ours.
    pub async fn ensure(&self, session: &mut Session) -> Result<(), StepError> {
        let (schema, table) = (&self.schema, self.table());
        let body = format!(
            "begin \
               if not exists (select from pg_catalog.pg_namespace where nspname = {schema_text}) then \
                 create schema {schema}; comment on schema {schema} is {comment}; \
               end if; \
               if not {there} then \
                 create table {table} (marker text not null, item text not null, value jsonb not null, \
                   at timestamptz not null default pg_catalog.clock_timestamp(), primary key (marker, item)); \
                 comment on table {table} is {comment}; \
               elsif not {ours} then \
                 raise exception using errcode = 'duplicate_table', message = {foreign}; \
               end if; \
               insert into {table} (marker, item, value) values ({marker}, {under_way}, 'null') \
                 on conflict (marker, item) do nothing; \
             end",
            schema_text = literal(schema.as_str()),
            comment = literal(MADE_BY_US),
            there = self.there(),
            ours = self.ours(),
            foreign = literal(&format!("{table} is there and was not made by an upgrade")),
            marker = literal(&self.marker),
            under_way = literal(UNDER_WAY),
        );
        sqlx::raw_sql(AssertSqlSafe(alone("", &body)))
        .execute(session.connection())
        .await
        .map_err(|error| {
            let error = PostgresError::Sql { doing: format!("making the schema {schema} for what the run keeps"), source: error };
            let code = error.code().unwrap_or_default().to_owned();
            let error = StepError::from(error);
            match code.as_str() {
                "42501" => error.with_hint(
                    "grant CREATE on the database, or make a schema that this user owns and name it: `state_schema` on the target",
                ),
                "42P07" => error.with_hint("name a schema of its own: `state_schema` on the target"),
                _ => error,
            }
        })?;
        Ok(())
    }

    /// Spells the condition that the table is there, whoever may look into the schema.
    fn there(&self) -> String {
        format!(
            "exists (select from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
             where n.nspname = {} and c.relname = {})",
            literal(self.schema.as_str()),
            literal(self.table().name.as_str())
        )
    }

    /// Spells the condition that the table is there and one of ours.
    fn ours(&self) -> String {
        format!(
            "exists (select from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
             where n.nspname = {} and c.relname = {} and pg_catalog.obj_description(c.oid, 'pg_class') = {})",
            literal(self.schema.as_str()),
            literal(self.table().name.as_str()),
            literal(MADE_BY_US)
        )
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

    /// Writes the statement of [`Ledger::put`], to be sent together with the effect that it speaks of.
    ///
    /// # Errors
    /// The value cannot be written as JSON.
    pub fn put_statement(&self, item: &str, value: &impl Serialize) -> Result<String, StepError> {
        let value = serde_json::to_string(value).map_err(|error| {
            StepError::permanent("what the step keeps cannot be written as JSON").with_cause(&error)
        })?;
        Ok(format!(
            "insert into {} (marker, item, value) values ({}, {}, {}::jsonb) \
             on conflict (marker, item) do update set value = excluded.value, at = excluded.at",
            self.table(),
            literal(&self.marker),
            literal(item),
            literal(&value),
        ))
    }

    /// Writes the statement of [`Ledger::remove`], to be sent together with what undoes the effect.
    pub fn remove_statement(&self, item: &str) -> String {
        format!("delete from {} where marker = {} and item = {}", self.table(), literal(&self.marker), literal(item))
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
        let value = self.read(connection, Some(item)).await?.remove(item);
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
        self.read(connection, None).await
    }

    async fn read(
        &self,
        connection: &mut PgConnection,
        item: Option<&str>,
    ) -> Result<BTreeMap<String, Value>, PostgresError> {
        // A transaction that asks for what is not there is spoilt: so that is asked first.
        let there: bool = sqlx::query_scalar(AssertSqlSafe(format!("select {}", self.ours())))
            .fetch_one(&mut *connection)
            .await
            .doing(|| "looking for the ledger".into())?;
        if !there {
            return Ok(BTreeMap::new());
        }
        let read = sqlx::query_as::<_, (String, Json<Value>)>(AssertSqlSafe(format!(
            "select item, value from {table} where marker = $1 and item <> $2 and ($3::text is null or item = $3)",
            table = self.table(),
        )))
        .bind(&self.marker)
        .bind(UNDER_WAY)
        .bind(item)
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

    /// Removes what the step that is called keeps: all that the `commit` of most kinds has to do.
    ///
    /// A second call finds nothing.
    ///
    /// # Errors
    /// The server cannot be reached, or refused it.
    pub async fn forget(database: &Database, cx: &Context) -> Result<(), StepError> {
        let mut session = database.connect(cx).await?;
        Self::of(database, cx).clear(&mut session, &[]).await?;
        session.close().await;
        Ok(())
    }

    /// Removes all that the step keeps: its items, the tables that it named, and what is then empty.
    ///
    /// Called by `commit` and at the end of `rollback`; a second call finds nothing.
    ///
    /// # Errors
    /// The server refused it.
    pub async fn clear(&self, session: &mut Session, tables: &[TableName]) -> Result<(), StepError> {
        let drops: String = tables.iter().map(|table| format!("drop table if exists {table}; ")).collect();
        // The tables of the step's own first: a backup that reads one holds up nobody else.
        let body = format!(
            "begin if {ours} then delete from {table} where marker = {marker}; end if; end",
            ours = self.ours(),
            table = self.table(),
            marker = literal(&self.marker),
        );
        sqlx::raw_sql(AssertSqlSafe(alone(&drops, &body)))
            .execute(session.connection())
            .await
            .doing(|| "removing what the step kept in the database".into())?;
        let began = tokio::time::Instant::now();
        while !self.removed(session).await? && began.elapsed() < REMOVING {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Removes table and schema where nothing is in them; tells whether there was nothing more to do.
    async fn removed(&self, session: &mut Session) -> Result<bool, StepError> {
        let (schema, table) = (&self.schema, self.table());
        // Its own transaction, which gives up where a transaction of another run is at work: that run
        // removes the table later. A vacuum or a backup does not: it is waited for.
        let body = format!(
            "begin \
               set local lock_timeout = '20ms'; \
               if {ours} then \
                 if not exists (select from {table}) then \
                   lock table {table} in access exclusive mode; \
                   if not exists (select from {table}) then drop table {table}; end if; \
                 end if; \
               end if; \
               if {schema_ours} and not {there} then \
                 begin drop schema {schema}; exception when dependent_objects_still_exist then null; end; \
               end if; \
             exception when lock_not_available or undefined_table or insufficient_privilege then null; end",
            ours = self.ours(),
            there = self.there(),
            schema_ours = format_args!(
                "exists (select from pg_catalog.pg_namespace where nspname = {} \
                 and pg_catalog.obj_description(oid, 'pg_namespace') = {})",
                literal(schema.as_str()),
                literal(MADE_BY_US)
            ),
        );
        sqlx::raw_sql(AssertSqlSafe(alone("", &body)))
            .execute(session.connection())
            .await
            .doing(|| "removing the ledger".into())?;
        let there: bool = sqlx::query_scalar(AssertSqlSafe(format!("select {}", self.ours())))
            .fetch_one(session.connection())
            .await
            .doing(|| "looking for the ledger".into())?;
        if !there {
            return Ok(true);
        }
        let empty = sqlx::query_scalar::<_, bool>(AssertSqlSafe(format!("select not exists (select from {table})")))
            .fetch_one(session.connection())
            .await
            .doing(|| "looking into the ledger".into());
        match empty {
            Ok(empty) => Ok(!empty),
            // Another run was first, or it is another user's.
            Err(error) if matches!(error.code(), Some("42P01" | "42501")) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }
}

/// Spells a transaction that no other run's on the ledger is beside, and that sees what the one
/// before it did, whatever the isolation is by default. One string of statements is one transaction.
fn alone(first: &str, body: &str) -> String {
    format!(
        "set transaction isolation level read committed; {first}select pg_catalog.pg_advisory_xact_lock({key}); \
         do {body}",
        key = advisory_key("ledger"),
        body = literal(body)
    )
}
