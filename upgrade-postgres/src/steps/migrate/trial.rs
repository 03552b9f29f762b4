//! Tries all that is pending in a transaction that is rolled back, and tells which locks it took.

use std::collections::BTreeSet;
use std::time::Duration;

use sqlx::AssertSqlSafe;
use tokio::time::Instant;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::step::Change;
use upgrade_core::units::Span;

use super::work::{Place, explained, run_batch};
use crate::error::{Doing, PostgresError};
use crate::migrations::Script;
use crate::session::Session;
use crate::target::Database;

/// Adds what the trial saw to the changes of the scripts.
///
/// # Errors
/// A script fails; in a plan that is shown instead, as an earlier step may not have run.
pub(super) async fn run(
    cx: &Context,
    database: &Database,
    scripts: &[Script],
    changes: &mut [Change],
) -> Result<(), StepError> {
    let mut session = database.connect(cx).await?;
    let mut watch = database.connect_aside(cx).await?;
    let timeout = database.lock_policy().lock_timeout.as_millis().max(1);
    let canceller = session.canceller();
    let mut at = 0;
    let tried = canceller
        .cancels(cx, async {
            let begin = format!("begin; set local lock_timeout = {timeout}");
            sqlx::raw_sql(AssertSqlSafe(begin)).execute(session.connection()).await?;
            let tried = try_all(&mut session, &mut watch, scripts, changes, &mut at).await;
            // A broken connection rolls back by itself.
            let _ = sqlx::raw_sql("rollback").execute(session.connection()).await;
            tried
        })
        .await;
    session.close().await;
    watch.close().await;
    match tried {
        Err(error) if cx.is_dry_run() => {
            let error = StepError::from(error);
            if let Some(change) = changes.get_mut(at) {
                add(change, &format!("fails now: {error}; what follows was not tried"));
            }
            Ok(())
        }
        Err(error) => Err(error.into()),
        Ok(()) => Ok(()),
    }
}

async fn try_all(
    session: &mut Session,
    watch: &mut Session,
    scripts: &[Script],
    changes: &mut [Change],
    at: &mut usize,
) -> Result<(), PostgresError> {
    let pid = session.facts().pid;
    let mut known = BTreeSet::new();
    for (number, (script, change)) in scripts.iter().zip(changes).enumerate() {
        *at = number;
        if script.outside_transaction {
            add(change, "not tried, as no transaction takes it; nor is what follows");
            return Ok(());
        }
        let began = Instant::now();
        let batch = format!("{}\n;", script.text);
        let ran = run_batch(session.connection(), batch).await;
        let took = began.elapsed();
        ran.map_err(|(done, error)| explained(script, Place::after(&script.text, 1, done), error))?;
        let held = locks(watch, pid).await?;
        let new: Vec<_> = held.difference(&known).cloned().collect();
        let locks = if new.is_empty() { "no strong lock".to_owned() } else { new.join(", ") };
        add(change, &format!("tried: {}, {locks}", Span(Duration::from_millis(took.as_millis().max(1) as u64))));
        known.extend(held);
    }
    Ok(())
}

fn add(change: &mut Change, what: &str) {
    let before = change.summary.take().map(|before| format!("{before}; ")).unwrap_or_default();
    change.summary = Some(format!("{before}{what}"));
}

/// Lists the locks that others would wait for; what the transaction made itself nobody else sees.
async fn locks(watch: &mut Session, pid: i32) -> Result<BTreeSet<String>, PostgresError> {
    let rows: Vec<String> = sqlx::query_scalar(
        "select format('%s on %s', l.mode, c.oid::regclass) from pg_locks l join pg_class c on c.oid = l.relation \
         where l.pid = $1 and l.locktype = 'relation' and l.granted \
         and l.database = (select oid from pg_database where datname = current_database()) \
         and l.mode not in ('AccessShareLock', 'RowShareLock', 'RowExclusiveLock') \
         and c.relnamespace not in ('pg_catalog'::regnamespace, 'pg_toast'::regnamespace)",
    )
    .bind(pid)
    .fetch_all(watch.connection())
    .await
    .doing(|| "looking at the locks".into())?;
    Ok(rows.into_iter().collect())
}
