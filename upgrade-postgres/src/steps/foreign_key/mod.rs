//! `postgres.foreign_key`: adds a foreign key without holding up writes.
//!
//! ```text
//!            ADD … NOT VALID, and its row           VALIDATE, and its row
//!  found ───────────────────────────────► added ─────────────────────────► valid
//!    ▲        both tables, for a moment     │   the whole table is read,     │
//!    │                                      │   reads and writes go on       │
//!    └────────── DROP, and both rows ───────┴────────────────────────────────┘
//! ```

mod catalog;
mod config;

pub use config::{Action, ForeignKeyConfig, References, Unindexed};

use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgConnection};
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;

use crate::error::{Doing, PostgresError};
use crate::identifier::{Identifier, TableName};
use crate::ledger::Ledger;
use crate::session::Session;
use crate::target::Database;
use catalog::{Key, Violations, add, drop_key, list};

/// Adds a foreign key without holding up writes.
#[derive(Debug, Clone)]
pub struct ForeignKey {
    config: ForeignKeyConfig,
    database: Arc<Database>,
}

/// Holds what undoing needs: what was found, and what is intended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForeignKeyUndo {
    table: TableName,
    name: Identifier,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    found: Option<Key>,
    /// None in a plan only, where a table is not there yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    intended: Option<Key>,
}

/// Tells what stands there now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForeignKeyOutput {
    /// The foreign key in one line.
    pub foreign_key: String,
}

/// The ledger's item for the constraint that the step added.
const ADDED: &str = "added";
/// The ledger's item for the validation.
const VALIDATED: &str = "validated";

/// Holds what `prepare` found.
struct Look {
    found: Option<Key>,
    intended: Key,
    indexed: bool,
}

impl ForeignKey {
    /// Makes the step from its configuration.
    ///
    /// # Errors
    /// The target is not a database, or columns are missing or do not match in number.
    pub fn from_config(config: ForeignKeyConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let database = cx.target::<Database>(&config.target)?;
        if config.columns.is_empty() {
            return Err(BuildError::new("the foreign key has no columns").at("columns"));
        }
        let referenced = config.references.columns.len();
        if referenced != 0 && referenced != config.columns.len() {
            return Err(BuildError::new(format!("{} columns refer to {referenced}", config.columns.len()))
                .at("references.columns")
                .with_hint("name one referenced column for each of `columns`, in the same order"));
        }
        if config.initially_deferred && !config.deferrable {
            return Err(BuildError::new("what is not deferrable cannot be deferred")
                .at("initially_deferred")
                .with_hint("set `deferrable: true` as well"));
        }
        Ok(Self { config, database })
    }

    /// Reads all that the answer to `prepare` depends on.
    async fn look(
        &self,
        connection: &mut PgConnection,
        major: i32,
        dry_run: bool,
    ) -> Result<Option<Look>, PostgresError> {
        let config = &self.config;
        for (table, key) in [(&config.table, "table"), (&config.references.table, "references.table")] {
            let row: Option<(String, bool, bool)> = sqlx::query_as(
                "select relkind::text, pg_has_role(relowner, 'USAGE'), has_table_privilege(oid, 'REFERENCES') \
                 from pg_class where oid = to_regclass($1)",
            )
            .bind(table.to_string())
            .fetch_optional(&mut *connection)
            .await
            .doing(|| format!("looking at {table}"))?;
            let referring = key == "table";
            let refusal = match row {
                None if dry_run => return Ok(None),
                None => (format!("there is no table {table}"), format!("correct `{key}`; a schema other than `public` is written with it: `shop.orders`")),
                Some((kind, ..)) if !matches!(kind.as_str(), "r" | "p") => {
                    (format!("{table} is not a table"), format!("correct `{key}`"))
                }
                Some((kind, ..)) if referring && kind == "p" && major < 18 => (
                    format!("{table} is partitioned: before PostgreSQL 18 it takes no foreign key that is validated later"),
                    "give each partition the foreign key with a step of its own; a `postgres.sql` step with `alter table … \
                     add foreign key` on the whole then finds them and takes moments"
                        .to_owned(),
                ),
                Some((_, false, _)) if referring => (
                    format!("{table} belongs to another user, who alone may change it"),
                    "connect as its owner, or grant the owner's role to the user of the target's `url`".to_owned(),
                ),
                Some((_, _, false)) => (
                    format!("this user may not refer to {table}"),
                    format!("grant references on {table} to the user of the target's `url`"),
                ),
                Some(_) => continue,
            };
            return Err(StepError::permanent(refusal.0).with_hint(refusal.1).into());
        }
        let intended = self.intended(&mut *connection).await?;
        let understood = self.understood(&mut *connection, &intended).await;
        let ended = sqlx::raw_sql("rollback").execute(&mut *connection).await;
        understood?;
        ended?;
        let found = catalog::read(&mut *connection, &config.table, &config.name).await?;
        if let Some(found) = found.as_ref().filter(|found| !found.is_like(&intended)) {
            return Err(StepError::permanent(format!(
                "{} has a foreign key {} already, another one: {}, not {}",
                config.table,
                config.name,
                found.describe(),
                intended.describe()
            ))
            .with_hint("give the foreign key another `name`, or drop the old one with a step before")
            .into());
        }
        if !found.as_ref().is_some_and(|found| found.valid) {
            let violations = Violations::find(&mut *connection, &config.table, &intended).await?;
            if violations.rows > 0 {
                return Err(violations.error(&config.table, &intended).into());
            }
        }
        let indexed: bool = sqlx::query_scalar(
            "select exists (select from pg_index i where i.indrelid = to_regclass($1) and i.indisvalid and i.indpred is null \
               and (select array_agg(k order by k) from unnest((i.indkey::int2[])[0:cardinality($2::text[]) - 1]) k) = \
                 (select array_agg(a.attnum order by a.attnum) from pg_attribute a where a.attrelid = i.indrelid and a.attname = any($2)))",
        )
        .bind(config.table.to_string())
        .bind(config.columns.iter().map(|column| column.as_str().to_owned()).collect::<Vec<_>>())
        .fetch_one(&mut *connection)
        .await
        .doing(|| "looking for an index".into())?;
        Ok(Some(Look { found, intended, indexed }))
    }

    async fn intended(&self, connection: &mut PgConnection) -> Result<Key, PostgresError> {
        let config = &self.config;
        let mut referenced = config.references.columns.clone();
        if referenced.is_empty() {
            let names: Vec<String> = sqlx::query_scalar(
                "select a.attname::text from pg_index i cross join unnest(i.indkey::int2[]) with ordinality as k(number, place) \
                 join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.number \
                 where i.indrelid = to_regclass($1) and i.indisprimary and k.place <= i.indnkeyatts order by k.place",
            )
            .bind(config.references.table.to_string())
            .fetch_all(connection)
            .await
            .doing(|| format!("reading the primary key of {}", config.references.table))?;
            if names.len() != config.columns.len() {
                let count = config.columns.len();
                return Err(StepError::permanent(format!(
                    "the primary key of {} has {} columns, and {count} refer to it",
                    config.references.table,
                    names.len()
                ))
                .with_hint("name the referenced columns: `references: { table: …, columns: […] }`")
                .into());
            }
            referenced = names
                .into_iter()
                .map(Identifier::new)
                .collect::<Result<_, _>>()
                .map_err(|error| StepError::permanent("a column's name cannot be read").with_cause(&error))?;
        }
        Ok(Key {
            columns: config.columns.clone(),
            references: config.references.table.clone(),
            referenced,
            on_delete: config.on_delete,
            on_update: config.on_update,
            match_full: config.match_full,
            deferrable: config.deferrable,
            initially_deferred: config.initially_deferred,
            valid: true,
            comment: None,
            beyond: None,
        })
    }

    /// Lets the server judge the definition on empty tables of the same columns, of which nothing stays.
    async fn understood(&self, connection: &mut PgConnection, intended: &Key) -> Result<(), PostgresError> {
        let config = &self.config;
        let (referring, referenced) = if config.table == intended.references {
            ("pg_temp.upgrade_shape", "pg_temp.upgrade_shape")
        } else {
            ("pg_temp.upgrade_shape", "pg_temp.upgrade_referenced_shape")
        };
        let mut sql = format!("begin; create table {referenced} (like {} including indexes)", intended.references);
        if referring != referenced {
            sql.push_str(&format!("; create table {referring} (like {})", config.table));
        }
        sql.push_str(&format!("; alter table {referring} add constraint {} {}", config.name, intended.sql(referenced)));
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.doing(|| "understanding the foreign key".into())?;
        Ok(())
    }

    fn change(&self, look: Option<&Look>) -> Change {
        let subject =
            format!("foreign key {} of {}", self.config.name.as_str(), String::from(self.config.table.clone()));
        let Some(look) = look else {
            return Change::new(Effect::Create, subject)
                .with_summary("known when a step before it has made its tables");
        };
        let unindexed = match look.indexed || self.config.unindexed == Unindexed::Allow {
            true => String::new(),
            false => format!(
                "; no index begins with {}: every deletion of a referenced row will read the whole table",
                list(&self.config.columns)
            ),
        };
        match &look.found {
            None => Change::new(Effect::Create, subject)
                .with_summary(format!("{}, NOT VALID, then validated{unindexed}", look.intended.describe())),
            Some(_) => Change::new(Effect::Modify, subject)
                .with_summary(format!("{} is validated{unindexed}", look.intended.describe())),
        }
    }

    async fn open(&self, cx: &Context) -> Result<(Session, Ledger), StepError> {
        let mut session = self.database.connect(cx).await?;
        session.require_writable()?;
        let ledger = Ledger::of(&self.database, cx);
        ledger.ensure(&mut session).await?;
        Ok((session, ledger))
    }

    /// Adds the constraint, unless that was done, in one transaction with the row that says so.
    async fn add(
        &self,
        cx: &Context,
        session: &mut Session,
        ledger: &Ledger,
        undo: &ForeignKeyUndo,
        intended: &Key,
    ) -> Result<(), PostgresError> {
        let ForeignKeyUndo { table, name, found, .. } = undo;
        let what = format!("adding the foreign key {name}");
        self.database
            .lock_policy()
            .transaction(cx, session, &what, move |connection, _| {
                Box::pin(async move {
                    let present = catalog::read(connection, table, name).await?;
                    let added = ledger.get::<bool>(connection, ADDED).await?.is_some();
                    let expected = match (added, &present) {
                        (true, Some(present)) => present.is_like(intended),
                        (false, Some(present)) => present.is_like(intended) && (present.valid || found.is_some()),
                        (false, None) => found.is_none(),
                        (true, None) => false,
                    };
                    if expected && present.is_some() {
                        return Ok(());
                    }
                    if !expected && cx.on_conflict() == OnConflict::Stop {
                        return Err(conflict(undo, present.as_ref()).into());
                    }
                    if present.is_some() {
                        drop_key(connection, table, name).await?;
                    }
                    add(connection, table, name, intended).await?;
                    ledger.put(connection, ADDED, &true).await
                })
            })
            .await
    }

    /// Validates the constraint, unless that was done, in one transaction with the row that says so.
    async fn validate(
        &self,
        cx: &Context,
        session: &mut Session,
        ledger: &Ledger,
        undo: &ForeignKeyUndo,
        intended: &Key,
    ) -> Result<(), PostgresError> {
        let ForeignKeyUndo { table, name, .. } = undo;
        cx.progress(0, None, format!("validating {name}: reads {table} while reads and writes go on"));
        let what = format!("validating the foreign key {name}");
        let validated = self
            .database
            .lock_policy()
            .transaction(cx, session, &what, move |connection, _| {
                Box::pin(async move {
                    match catalog::read(connection, table, name).await? {
                        Some(present) if present.is_like(intended) && present.valid => return Ok(()),
                        Some(present) if present.is_like(intended) => {}
                        present => return Err(conflict(undo, present.as_ref()).into()),
                    }
                    ledger.put(connection, VALIDATED, &true).await?;
                    sqlx::raw_sql(AssertSqlSafe(format!("alter table {table} validate constraint {name}")))
                        .execute(connection)
                        .await
                        .doing(|| format!("validating {name}"))?;
                    Ok(())
                })
            })
            .await;
        match validated {
            Err(error) if error.code() == Some("23503") => {
                let violations = Violations::find(session.connection(), table, intended).await?;
                if violations.rows == 0 { Err(error) } else { Err(violations.error(table, intended).into()) }
            }
            validated => validated,
        }
    }
}

fn conflict(undo: &ForeignKeyUndo, present: Option<&Key>) -> StepError {
    let text = |key: Option<&Key>| key.map_or_else(|| "absent".to_owned(), Key::describe);
    StepError::conflict(Conflict {
        subject: format!("foreign key {} of {}", undo.name.as_str(), String::from(undo.table.clone())),
        found: text(undo.found.as_ref()),
        intended: text(undo.intended.as_ref()),
        present: text(present),
    })
}

#[async_trait]
impl Step for ForeignKey {
    const KIND: &'static str = "postgres.foreign_key";
    type Undo = ForeignKeyUndo;
    type Output = ForeignKeyOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<ForeignKeyUndo, ForeignKeyOutput>, StepError> {
        let mut session = self.database.connect(cx).await?;
        session.require_writable()?;
        let (canceller, major) = (session.canceller(), session.facts().major());
        let looked = canceller.cancels(cx, self.look(session.connection(), major, cx.is_dry_run())).await;
        session.close().await;
        let look = match looked {
            Ok(look) => look,
            // Columns and keys may be made by the steps that the plan has not run.
            Err(error) if cx.is_dry_run() && matches!(error.code(), Some("42703" | "42830")) => None,
            Err(error) => return Err(error.into()),
        };
        let refused = look.as_ref().is_some_and(|look| !look.indexed) && self.config.unindexed == Unindexed::Refuse;
        if refused && !cx.is_dry_run() {
            return Err(StepError::permanent(format!(
                "no index of {} begins with {}: every deletion of a referenced row would read the whole table",
                self.config.table,
                list(&self.config.columns)
            ))
            .with_hint("build one with a `postgres.index` step before, or set `unindexed: allow`"));
        }
        let change = self.change(look.as_ref());
        let (found, intended) = match look {
            Some(look) => (look.found, Some(look.intended)),
            None => (None, None),
        };
        if let Some(found) = found.as_ref().filter(|found| found.valid) {
            let output = ForeignKeyOutput { foreign_key: found.describe() };
            return Ok(Prepared::unchanged(output, "the foreign key is there and valid"));
        }
        let undo = ForeignKeyUndo { table: self.config.table.clone(), name: self.config.name.clone(), found, intended };
        Ok(Prepared::change(undo, [change]))
    }

    async fn apply(&self, cx: &Context, undo: &ForeignKeyUndo) -> Result<ForeignKeyOutput, StepError> {
        let intended = undo.intended.as_ref().ok_or_else(|| {
            StepError::permanent("the undo record is one of a plan").with_hint("this is a defect: report it")
        })?;
        let (mut session, ledger) = self.open(cx).await?;
        self.add(cx, &mut session, &ledger, undo, intended).await?;
        self.validate(cx, &mut session, &ledger, undo, intended).await?;
        session.close().await;
        Ok(ForeignKeyOutput { foreign_key: intended.describe() })
    }

    async fn settle(&self, cx: &Context, _undo: &ForeignKeyUndo) -> Result<(), StepError> {
        self.database.settle(cx).await
    }

    async fn commit(&self, cx: &Context, _undo: &ForeignKeyUndo) -> Result<(), StepError> {
        Ledger::forget(&self.database, cx).await
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.database.clone()]
    }
}

#[async_trait]
impl Rollback for ForeignKey {
    async fn rollback(
        &self,
        cx: &Context,
        undo: &ForeignKeyUndo,
        _output: Option<&ForeignKeyOutput>,
    ) -> Result<(), StepError> {
        let (mut session, ledger) = self.open(cx).await?;
        let kept = &ledger;
        let ForeignKeyUndo { table, name, found, intended } = undo;
        let what = format!("taking back the foreign key {name}");
        self.database
            .lock_policy()
            .transaction(cx, &mut session, &what, move |connection, _| {
                Box::pin(async move {
                    let done = kept.all(connection).await?;
                    // Nothing was done, or it is undone already: what stands there is not ours.
                    if done.is_empty() {
                        return Ok(());
                    }
                    let present = catalog::read(connection, table, name).await?;
                    let as_found = match (&present, found) {
                        (None, None) => true,
                        (Some(present), Some(found)) => present.is_like(found) && present.valid == found.valid,
                        _ => false,
                    };
                    if !as_found {
                        let ours = match (&present, intended) {
                            (Some(present), Some(intended)) => present.is_like(intended),
                            _ => false,
                        };
                        if !ours && cx.on_conflict() == OnConflict::Stop {
                            return Err(conflict(undo, present.as_ref()).into());
                        }
                        if present.is_some() {
                            drop_key(connection, table, name).await?;
                        }
                        if let Some(found) = found {
                            add(connection, table, name, found).await?;
                        }
                    }
                    kept.remove(connection, ADDED).await?;
                    kept.remove(connection, VALIDATED).await
                })
            })
            .await?;
        ledger.clear(&mut session, &[]).await?;
        session.close().await;
        Ok(())
    }
}
