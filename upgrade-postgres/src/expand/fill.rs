//! Fills the new shape of the rows that were there before the triggers.
//!
//! A row is written by touching it: the trigger does the rest, so that there is one place that says
//! what the new value is. What writers change meanwhile is in step since they changed it and moves
//! behind the end of the table as it was; so one pass over its pages meets every row that is left.

use serde::{Deserialize, Serialize};
use sqlx::{AssertSqlSafe, PgConnection};
use std::time::Duration;
use upgrade_core::context::Context;

use super::change::Expansion;
use super::phases::{Phase, Record};
use crate::error::{Doing, PostgresError};
use crate::identifier::literal;
use crate::ledger::Ledger;
use crate::locking::LockPolicy;
use crate::session::Session;

/// Where the filling is, written in the transaction of each batch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Bookmark {
    /// The next page.
    next: i64,
    /// The page behind the last one.
    end: i64,
    /// How many rows were filled.
    rows: u64,
}

const BOOKMARK: &str = "fill";

/// Waits longer for a row than for a table: nobody queues behind the lock of a row but who needs
/// that row. Shorter than the server's `deadlock_timeout`, so that of two that wait for each other
/// the filling gives way.
const ROW_PATIENCE: Duration = Duration::from_millis(500);

/// Fills what is left, and returns how many rows were filled in all.
pub(crate) async fn fill(
    cx: &Context,
    session: &mut Session,
    policy: &LockPolicy,
    ledger: &Ledger,
    expansion: &Expansion,
    record: &Record,
    pages: u32,
) -> Result<u64, PostgresError> {
    let table = &expansion.table;
    let mut policy = policy.clone();
    policy.lock_timeout = policy.lock_timeout.max(ROW_PATIENCE);
    let Some(pending) = &expansion.pending else {
        policy
            .transaction(cx, session, "noting that nothing has to be filled", move |connection, _| {
                Box::pin(async move { ledger.put(connection, Record::ITEM, &record.at(Phase::Filled)).await })
            })
            .await?;
        return Ok(0);
    };
    let silence = if expansion.silent { "set local session_replication_role = replica" } else { "" };
    loop {
        let what = format!("filling {table}");
        let bookmark = policy
            .transaction(cx, session, &what, move |connection, _| {
                Box::pin(async move {
                    let mut bookmark = match ledger.get::<Bookmark>(connection, BOOKMARK).await? {
                        Some(bookmark) => bookmark,
                        None => Bookmark { end: end_of(connection, expansion).await?, ..Bookmark::default() },
                    };
                    if bookmark.next >= bookmark.end {
                        return Ok(bookmark);
                    }
                    let until = bookmark.end.min(bookmark.next + i64::from(pages));
                    sqlx::raw_sql(silence).execute(&mut *connection).await?;
                    let filled = sqlx::raw_sql(AssertSqlSafe(format!(
                        "update {table} set {pending} = {pending} \
                         where ctid >= '({},0)' and ctid < '({until},0)' and {pending}",
                        bookmark.next
                    )))
                    .execute(&mut *connection)
                    .await
                    .doing(|| format!("filling {} of {table}", expansion.new))?;
                    bookmark.rows += filled.rows_affected();
                    bookmark.next = until;
                    ledger.put(connection, BOOKMARK, &bookmark).await?;
                    Ok(bookmark)
                })
            })
            .await?;
        let count = |pages: i64| u64::try_from(pages).unwrap_or(0);
        cx.progress(count(bookmark.next), count(bookmark.end), format!("{} rows of {table} are filled", bookmark.rows));
        if bookmark.next < bookmark.end {
            continue;
        }
        // Whoever moved rows without writing them (CLUSTER, VACUUM FULL) made another pass needed.
        let left = policy
            .transaction(cx, session, &what, move |connection, _| {
                Box::pin(async move {
                    let left: bool = sqlx::query_scalar(AssertSqlSafe(format!(
                        "select exists (select from {table} where {pending})"
                    )))
                    .fetch_one(&mut *connection)
                    .await
                    .doing(|| format!("looking for rows of {table} that are left"))?;
                    if left {
                        let again =
                            Bookmark { next: 0, end: end_of(connection, expansion).await?, rows: bookmark.rows };
                        ledger.put(connection, BOOKMARK, &again).await?;
                    } else {
                        ledger.put(connection, Record::ITEM, &record.at(Phase::Filled)).await?;
                    }
                    Ok(left)
                })
            })
            .await?;
        if !left {
            return Ok(bookmark.rows);
        }
    }
}

/// Reads how many rows were filled.
pub(super) async fn filled(connection: &mut PgConnection, ledger: &Ledger) -> Result<u64, PostgresError> {
    Ok(ledger.get::<Bookmark>(connection, BOOKMARK).await?.unwrap_or_default().rows)
}

async fn end_of(connection: &mut PgConnection, expansion: &Expansion) -> Result<i64, PostgresError> {
    sqlx::query_scalar(AssertSqlSafe(format!(
        "select pg_relation_size({}::regclass) / current_setting('block_size')::int8",
        literal(&expansion.table.to_string())
    )))
    .fetch_one(connection)
    .await
    .doing(|| "reading the size of the table".into())
}
