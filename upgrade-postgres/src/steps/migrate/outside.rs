//! Scripts that no transaction takes: statement by statement, with a note of how far they came.
//!
//! ```text
//!   Started { done: n } ──► a statement that a transaction takes: with Started { done: n+1 } in it
//!           │
//!           └──► another: Started { done: n, running } ──► the statement ──► Started { done: n+1 }
//!                                      │
//!                            crash: look what came of it, clear away what it left, go on
//! ```

use sqlx::{AssertSqlSafe, PgConnection};

use super::undo::{Note, Running};
use super::work::{How, Place, Work, explained, is_not_as_expected};
use crate::error::{Doing, PostgresError};
use crate::identifier::{Identifier, literal};
use crate::migrations::Script;
use crate::migrations::script::{Statement, StatementKind};

/// Runs a script from where its note says that it stopped, then writes the rows that go with it.
pub(super) async fn run(
    work: &mut Work<'_>,
    script: &Script,
    how: How<'_>,
    rows: &[String],
) -> Result<(), PostgresError> {
    let statements = script.statements()?;
    let note = work.ledger.get::<Note>(work.session.connection(), how.key).await?;
    let (done, mut interrupted) = match note {
        Some(Note::Started { done, running }) => (done, running),
        _ => (0, None),
    };
    let total = statements.len() as u64;
    for (at, statement) in statements.iter().enumerate().skip(done) {
        work.cx.progress(at as u64, total, format!("{}, line {}", script.file, statement.line));
        let next = work.ledger.put_statement(how.key, &Note::Started { done: at + 1, running: None })?;
        let ran = match &statement.kind {
            StatementKind::Transactional => {
                let batch = format!("{}\n;{next}", statement.text);
                work.transaction(script, statement.line, &statement.text, batch).await
            }
            _ => bare(work, script, statement, how.key, at, interrupted.take()).await,
        };
        match ran {
            Ok(()) if statement.kind == StatementKind::Transactional => {}
            Ok(()) => work.write(&script.file, &[next]).await?,
            Err(error) if how.partial && is_not_as_expected(&error) => work.write(&script.file, &[next]).await?,
            Err(error) => return Err(error),
        }
    }
    work.write(&script.file, rows).await
}

/// Clears away what a statement left that was not finished, before the undo of its script runs.
pub(super) async fn clear_after(work: &mut Work<'_>, note: &Note) -> Result<(), PostgresError> {
    let Note::Started { running: Some(running), .. } = note else { return Ok(()) };
    for statement in Script::new("the statement that was cut off", running.statement.clone()).statements()? {
        clear(work.session.connection(), &statement.kind, &running.indexes).await?;
    }
    Ok(())
}

/// Runs a statement outside of a transaction; one that a crash cut off is taken up.
async fn bare(
    work: &mut Work<'_>,
    script: &Script,
    statement: &Statement,
    key: &str,
    at: usize,
    interrupted: Option<Running>,
) -> Result<(), PostgresError> {
    let kind = &statement.kind;
    let before = match interrupted {
        Some(Running { indexes, .. }) => {
            if is_done(work.session.connection(), kind, &indexes).await? {
                return Ok(());
            }
            indexes
        }
        None => {
            let before = indexes(work.session.connection()).await?;
            let running = Running { statement: statement.text.clone(), indexes: before.clone() };
            let note = Note::Started { done: at, running: Some(running) };
            work.ledger.put(work.session.connection(), key, &note).await?;
            before
        }
    };
    // What runs CONCURRENTLY holds up nobody while it waits for the transactions before it.
    let patience = match kind {
        StatementKind::Other => String::new(),
        _ => format!("set lock_timeout = {}", work.policy.budget.as_millis()),
    };
    let (before, patience) = (&before, &patience);
    let ran = work
        .policy
        .outside_transaction(work.cx, &mut work.session, &script.file, move |connection, _| {
            Box::pin(async move {
                sqlx::raw_sql(AssertSqlSafe(patience.clone())).execute(&mut *connection).await?;
                clear(&mut *connection, kind, before).await?;
                let ran = sqlx::raw_sql(AssertSqlSafe(statement.text.clone())).execute(connection).await;
                ran.map(drop).map_err(|error| explained(script, Place::of(statement), error.into()))
            })
        })
        .await;
    if let Err(error) = &ran
        && !error.is_connection_lost()
    {
        // The error that there was tells more than one of clearing up, which is done again anyway.
        let _ = clear(work.session.connection(), kind, before).await;
    }
    ran
}

/// Lists the indexes that are there.
async fn indexes(connection: &mut PgConnection) -> Result<Vec<i64>, PostgresError> {
    sqlx::query_scalar(
        "select indexrelid::bigint from pg_index join pg_class on pg_class.oid = indexrelid \
         where relnamespace not in ('pg_catalog'::regnamespace, 'pg_toast'::regnamespace) order by 1",
    )
    .fetch_all(connection)
    .await
    .doing(|| "looking which indexes there are".into())
}

/// Tells whether a statement that a crash cut off was done nevertheless.
async fn is_done(connection: &mut PgConnection, kind: &StatementKind, before: &[i64]) -> Result<bool, PostgresError> {
    let query = match kind {
        StatementKind::CreateIndex { index, table } => {
            let name = match index {
                Some(index) => format!("and relname = {}", literal(&folded(index))),
                None => String::new(),
            };
            format!(
                "select exists (select from pg_index join pg_class on pg_class.oid = indexrelid \
                 where indrelid = to_regclass({}) and indisvalid and indexrelid::bigint <> all($1) {name})",
                literal(table)
            )
        }
        StatementKind::DropIndex { index } => {
            format!("select to_regclass({}) is null and $1::bigint[] is not null", literal(index))
        }
        StatementKind::Detach { table, partition } => {
            let (table, partition) = (literal(table), literal(partition));
            let pending: Option<bool> = sqlx::query_scalar(AssertSqlSafe(format!(
                "select inhdetachpending from pg_inherits \
                 where inhparent = to_regclass({table}) and inhrelid = to_regclass({partition})"
            )))
            .fetch_optional(&mut *connection)
            .await?;
            if pending == Some(true) {
                let finalize: String = sqlx::query_scalar(AssertSqlSafe(format!(
                    "select format('alter table %s detach partition %s finalize', to_regclass({table}), to_regclass({partition}))"
                )))
                .fetch_one(&mut *connection)
                .await?;
                sqlx::raw_sql(AssertSqlSafe(finalize)).execute(connection).await?;
                return Ok(true);
            }
            return Ok(pending.is_none());
        }
        _ => return Ok(false),
    };
    sqlx::query_scalar(AssertSqlSafe(query))
        .bind(before)
        .fetch_one(connection)
        .await
        .doing(|| "looking what came of a statement that was cut off".into())
}

/// Drops INVALID indexes that an attempt left: not there before, and being built by nobody.
async fn clear(connection: &mut PgConnection, kind: &StatementKind, before: &[i64]) -> Result<(), PostgresError> {
    let which = match kind {
        StatementKind::CreateIndex { index: Some(index), table } => {
            format!("indrelid = to_regclass({}) and relname = {}", literal(table), literal(&folded(index)))
        }
        StatementKind::CreateIndex { index: None, table } => format!("indrelid = to_regclass({})", literal(table)),
        // The server names what it builds beside the old one.
        StatementKind::Reindex => "relname ~ '_ccnew[0-9]*$'".to_owned(),
        _ => return Ok(()),
    };
    let left: Vec<String> = sqlx::query_scalar(AssertSqlSafe(format!(
        "select indexrelid::regclass::text from pg_index join pg_class on pg_class.oid = indexrelid \
         where {which} and not indisvalid and indexrelid::bigint <> all($1) \
         and not exists (select from pg_stat_progress_create_index p where p.index_relid = indexrelid)"
    )))
    .bind(before)
    .fetch_all(&mut *connection)
    .await
    .doing(|| "looking for INVALID indexes".into())?;
    for index in left {
        sqlx::raw_sql(AssertSqlSafe(format!("drop index concurrently if exists {index}")))
            .execute(&mut *connection)
            .await
            .doing(|| format!("dropping the INVALID index {index}"))?;
    }
    Ok(())
}

/// Reads a name as the server does: folded to lower case unless it is quoted.
fn folded(name: &str) -> String {
    match name.strip_prefix('"').and_then(|name| name.strip_suffix('"')) {
        Some(quoted) => quoted.replace("\"\"", "\""),
        None => {
            Identifier::new(name.to_lowercase()).map_or_else(|_| name.to_lowercase(), |name| name.as_str().to_owned())
        }
    }
}
