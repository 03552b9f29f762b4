//! What each phase does, and how all of it is taken back.

use serde::{Deserialize, Serialize};
use sqlx::{AssertSqlSafe, PgConnection};
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};

use super::change::Expansion;
use super::definitions::{self, Copies};
use super::{catalog, fill, statements};
use crate::error::{Doing, PostgresError};
use crate::identifier::{TableName, literal};
use crate::ledger::Ledger;
use crate::locking::LockPolicy;
use crate::session::Session;

/// Says how far it has come; see the drawing at the head of [`crate::expand`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    Expanded,
    Filled,
    Indexed,
    Valid,
    InStep,
    Contracted,
}

impl Phase {
    #[cfg(test)]
    pub(super) const ALL: [Self; 6] =
        [Self::Expanded, Self::Filled, Self::Indexed, Self::Valid, Self::InStep, Self::Contracted];
}

/// What the ledger keeps, in the transaction of each phase.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) phase: Phase,
    /// Digest of what keeps the shapes in step.
    pub(crate) token: String,
    pub(crate) copies: Copies,
}

impl Record {
    pub(crate) const ITEM: &'static str = "phase";

    pub(crate) fn at(&self, phase: Phase) -> Self {
        Self { phase, ..self.clone() }
    }
}

/// Marks a schema as made for views of new shapes, so that the last one may remove it.
pub(super) const MADE_BY_US: &str = "Tables in their new shape, until the upgrade that changes them is committed.";

pub(super) async fn run(connection: &mut PgConnection, sql: &str) -> Result<(), PostgresError> {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(connection).await.doing(|| sql.to_owned())?;
    Ok(())
}

/// Locks the table first and once, so that no later statement waits for a stronger lock of it.
pub(super) async fn begin(connection: &mut PgConnection, expansion: &Expansion) -> Result<(), PostgresError> {
    run(connection, &format!("set local search_path to {}", expansion.search_path())).await?;
    run(connection, &format!("lock table {} in access exclusive mode", expansion.table)).await
}

fn conflict(expansion: &Expansion, found: &str, intended: &str, present: &str) -> StepError {
    let column = expansion.old.as_ref().unwrap_or(&expansion.name_after);
    StepError::conflict(Conflict {
        subject: format!("column {column} of {}", expansion.table),
        found: found.into(),
        intended: intended.into(),
        present: present.into(),
    })
}

/// Makes the second shape and what keeps both in step, in one short transaction.
pub(crate) async fn expand(
    cx: &Context,
    session: &mut Session,
    policy: &LockPolicy,
    ledger: &Ledger,
    expansion: &Expansion,
    found: &str,
) -> Result<Record, PostgresError> {
    let what = format!("expanding {}", expansion.table);
    policy
        .transaction(cx, session, &what, move |connection, _| {
            Box::pin(async move {
                if let Some(record) = ledger.get::<Record>(connection, Record::ITEM).await? {
                    return Ok(record);
                }
                begin(connection, expansion).await?;
                let present = catalog::present(connection, expansion).await?;
                if present != found && cx.on_conflict() == OnConflict::Stop {
                    return Err(conflict(expansion, found, "the same column, in two shapes", &present).into());
                }
                let (_, stored) = definitions::columns(connection, expansion).await?;
                let stored: Vec<&str> = stored.iter().map(String::as_str).collect();
                let copies = definitions::read(connection, expansion).await?;
                for sql in additions(expansion, &copies, &stored) {
                    run(connection, &sql).await?;
                }
                for sql in definitions::manners(connection, expansion).await? {
                    run(connection, &sql).await?;
                }
                let token = catalog::in_step(connection, expansion).await?;
                let record = Record { phase: Phase::Expanded, token, copies };
                ledger.put(connection, Record::ITEM, &record).await?;
                Ok(record)
            })
        })
        .await
}

/// Spells what the first transaction adds.
fn additions(expansion: &Expansion, copies: &Copies, stored: &[&str]) -> Vec<String> {
    let Expansion { table, new, type_name, .. } = expansion;
    let default = expansion.default.as_ref().filter(|_| expansion.old.is_none());
    let mut sql = Vec::new();
    let Some(pending) = &expansion.pending else {
        // The server keeps such a default beside the table, and looks at no row for NOT NULL.
        let default = default.map(|default| format!(" default {default}")).unwrap_or_default();
        let not_null = if expansion.not_null { " not null" } else { "" };
        return vec![format!("alter table {table} add column {new} {type_name}{default}{not_null}")];
    };
    sql.push(format!("alter table {table} add column {new} {type_name}, add column {pending} boolean default true"));
    if let Some(default) = default {
        sql.push(format!("alter table {table} alter column {new} set default {default}"));
    }
    if let (Some(default), Some(_)) = (&expansion.default, &expansion.old) {
        // Does the default fit? At commit it would be too late to find out.
        sql.push(format!("alter table {table} alter column {new} set default {default}"));
        sql.push(format!("alter table {table} alter column {new} drop default"));
    }
    sql.push(statements::function(expansion, stored, true));
    sql.extend(statements::triggers(expansion, true));
    for copy in &copies.constraints {
        sql.push(format!("alter table {table} add constraint {} {} not valid", copy.name, copy.definition));
    }
    if let Some((name, check)) = statements::not_null_check(expansion) {
        sql.push(format!("alter table {table} add constraint {name} {check} not valid"));
    }
    sql
}

/// Builds the indexes of the new shape beside live traffic.
pub(crate) async fn index(
    cx: &Context,
    session: &mut Session,
    policy: &LockPolicy,
    ledger: &Ledger,
    expansion: &Expansion,
    record: &Record,
) -> Result<(), PostgresError> {
    for copy in &record.copies.indexes {
        let what = format!("building index {} of the new shape", copy.original);
        cx.progress(0, None, what.clone());
        let name = TableName::new(expansion.table.schema.clone(), copy.name.clone());
        let (name, path) = (&name, &expansion.search_path());
        policy
            .outside_transaction(cx, session, &what, move |connection, _| {
                Box::pin(async move {
                    let valid: Option<bool> =
                        sqlx::query_scalar("select indisvalid from pg_index where indexrelid = to_regclass($1)")
                            .bind(name.to_string())
                            .fetch_optional(&mut *connection)
                            .await?;
                    if valid == Some(true) {
                        return Ok(());
                    }
                    if valid.is_some() {
                        run(connection, &format!("drop index concurrently if exists {name}")).await?;
                    }
                    run(connection, &format!("set search_path to {path}")).await?;
                    // Building waits for every transaction on the table, and holds up nobody meanwhile.
                    run(connection, "set lock_timeout = 0").await?;
                    let built = run(connection, &copy.create).await;
                    // Of two errors the first tells more.
                    let reset = run(connection, "reset search_path").await;
                    built.and(reset)
                })
            })
            .await?;
    }
    note(cx, session, policy, ledger, record, Phase::Indexed).await
}

/// Validates the constraints of the new shape beside live traffic.
pub(crate) async fn validate(
    cx: &Context,
    session: &mut Session,
    policy: &LockPolicy,
    ledger: &Ledger,
    expansion: &Expansion,
    record: &Record,
) -> Result<(), PostgresError> {
    let copies = record.copies.constraints.iter().filter(|copy| copy.valid).map(|copy| copy.name.clone());
    let not_null = expansion.pending.as_ref().and_then(|_| statements::not_null_check(expansion)).map(|(name, _)| name);
    for name in copies.chain(not_null) {
        let sql = format!("alter table {} validate constraint {name}", expansion.table);
        let sql = &sql;
        let what = format!("validating a constraint of {}", expansion.table);
        cx.progress(0, None, what.clone());
        policy
            .transaction(cx, session, &what, move |connection, _| Box::pin(async move { run(connection, sql).await }))
            .await?;
    }
    note(cx, session, policy, ledger, record, Phase::Valid).await
}

async fn note(
    cx: &Context,
    session: &mut Session,
    policy: &LockPolicy,
    ledger: &Ledger,
    record: &Record,
    phase: Phase,
) -> Result<(), PostgresError> {
    policy
        .transaction(cx, session, "noting how far it has come", move |connection, _| {
            Box::pin(async move { ledger.put(connection, Record::ITEM, &record.at(phase)).await })
        })
        .await
}

/// Takes away what filling needed, sets NOT NULL without a scan, and shows the new shape.
pub(crate) async fn finish(
    cx: &Context,
    session: &mut Session,
    policy: &LockPolicy,
    ledger: &Ledger,
    expansion: &Expansion,
    record: &Record,
) -> Result<(), PostgresError> {
    let version = session.facts().version;
    let what = format!("finishing the new shape of {}", expansion.table);
    policy
        .transaction(cx, session, &what, move |connection, _| {
            Box::pin(async move {
                begin(connection, expansion).await?;
                same(cx, connection, expansion, record).await?;
                let Expansion { table, new, .. } = expansion;
                if expansion.pending.is_some() {
                    if let Some((name, _)) = statements::not_null_check(expansion) {
                        run(connection, &format!("alter table {table} alter column {new} set not null")).await?;
                        run(connection, &format!("alter table {table} drop constraint if exists {name}")).await?;
                    }
                    let (_, stored) = definitions::columns(connection, expansion).await?;
                    let stored: Vec<&str> = stored.iter().map(String::as_str).collect();
                    for sql in statements::filled(expansion, &stored) {
                        run(connection, &sql).await?;
                    }
                }
                if let Some(schema) = &expansion.schema {
                    run(
                        connection,
                        &format!(
                            "do $do$ begin if to_regnamespace({name}) is null then create schema {schema}; \
                             comment on schema {schema} is {comment}; end if; end $do$",
                            name = literal(&schema.to_string()),
                            comment = literal(MADE_BY_US)
                        ),
                    )
                    .await?;
                    let (all, _) = definitions::columns(connection, expansion).await?;
                    let all: Vec<&str> = all.iter().map(String::as_str).collect();
                    for sql in statements::view(expansion, &all, version) {
                        run(connection, &sql).await?;
                    }
                    for sql in definitions::privileges(connection, expansion).await? {
                        run(connection, &sql).await?;
                    }
                }
                let token = catalog::in_step(connection, expansion).await?;
                let record = Record { phase: Phase::InStep, token, copies: record.copies.clone() };
                ledger.put(connection, Record::ITEM, &record).await
            })
        })
        .await
}

/// Asks that nobody else changed what keeps the shapes in step.
pub(super) async fn same(
    cx: &Context,
    connection: &mut PgConnection,
    expansion: &Expansion,
    record: &Record,
) -> Result<(), PostgresError> {
    let present = catalog::in_step(connection, expansion).await?;
    if present == record.token || cx.on_conflict() == OnConflict::Overwrite {
        return Ok(());
    }
    Err(conflict(expansion, "the column in one shape", &record.token, &present).into())
}

/// Reads how far it has come, and how many rows were filled.
pub(crate) async fn progress(
    connection: &mut PgConnection,
    ledger: &Ledger,
) -> Result<(Option<Record>, u64), PostgresError> {
    let record = ledger.get::<Record>(connection, Record::ITEM).await?;
    let rows = fill::filled(connection, ledger).await?;
    Ok((record, rows))
}
