//! A backup that the server makes itself: a copy of the database beside it.

use sqlx::AssertSqlSafe;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use super::swap::Like;
use crate::error::{Doing, PostgresError};
use crate::identifier::Identifier;
use crate::session::Session;

/// Names the copy that a step makes: the same in every call.
pub(crate) fn copy_name(cx: &Context) -> Identifier {
    Identifier::derived("_upgrade_backup", &cx.marker())
}

/// Copies the database, unless it was copied already, and lets nobody into the copy.
///
/// # Errors
/// Somebody is connected to it.
pub(crate) async fn copy(
    cx: &Context,
    session: &mut Session,
    source: &Identifier,
    like: &Like,
) -> Result<(), StepError> {
    let copy = copy_name(cx);
    // The server shows a copy when it is complete, and removes what a crash left of one.
    let there: bool = sqlx::query_scalar("select exists (select from pg_database where datname = $1)")
        .bind(copy.as_str())
        .fetch_one(session.connection())
        .await
        .doing(|| "looking for the copy".into())?;
    if !there {
        let sql = format!("create database {copy} template {source} owner {}", like.owner);
        let canceller = session.canceller();
        let connection = session.connection();
        let copied = canceller
            .cancels(cx, async {
                sqlx::raw_sql(AssertSqlSafe(sql))
                    .execute(connection)
                    .await
                    .doing(|| format!("copying database {source}"))
            })
            .await;
        copied.map_err(|error| match error.code() {
            Some("55006") => in_use(StepError::from(error)),
            _ => error.into(),
        })?;
    }
    sqlx::raw_sql(AssertSqlSafe(format!("alter database {copy} allow_connections false")))
        .execute(session.connection())
        .await
        .doing(|| "closing the copy".into())?;
    Ok(())
}

/// Tells what to do about those who are connected.
pub(crate) fn in_use(error: StepError) -> StepError {
    error.with_hint(
        "stop what uses the database first (an earlier step), or take `method: dump`, which needs no such rest",
    )
}

/// Counts the sessions that keep the database from being copied.
pub(crate) async fn others(session: &mut Session) -> Result<i64, PostgresError> {
    sqlx::query_scalar(
        "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() \
         and backend_type = 'client backend'",
    )
    .fetch_one(session.connection())
    .await
    .doing(|| "counting who is connected".into())
}
