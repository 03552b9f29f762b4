//! The sessions of others on the database: who they are, and how they end.

use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::PgConnection;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::units::Span;

use crate::error::{Doing, PostgresError, cancelled};
use crate::session::Session;

/// How often the sessions are looked at while they end.
const LOOK: Duration = Duration::from_millis(50);

/// Says how long is waited for the sessions of others.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// For the end of a transaction.
    pub(super) grace: Duration,
    /// For a session that was told to end.
    pub(super) end: Duration,
}

/// Describes a session of somebody else.
#[derive(Debug, Clone)]
pub(super) struct Other {
    pid: i32,
    user: String,
    application: String,
    idle: bool,
    /// Whether this user may see what the session does, and end it.
    visible: bool,
    endable: bool,
}

/// Lists who else is on the database: neither superusers, nor replication, nor sessions of ours.
///
/// Of those that this user may see, only those that began between the two times.
pub(super) async fn others(
    session: &mut Session,
    since: Option<&str>,
    until: Option<&str>,
) -> Result<Vec<Other>, PostgresError> {
    let found: Vec<(i32, String, String, bool, bool, bool)> = sqlx::query_as(
        "select a.pid, a.usename::text, coalesce(a.application_name, ''), coalesce(a.state = 'idle', false), \
           a.backend_start is not null, \
           m.rolsuper or pg_has_role(session_user, a.usesysid, 'member') \
             or pg_has_role(session_user, 'pg_signal_backend', 'member') \
         from pg_stat_activity a join pg_roles r on r.oid = a.usesysid join pg_roles m on m.rolname = session_user \
         where a.datname = current_database() and not r.rolsuper and a.pid <> pg_backend_pid() \
           and coalesce(a.backend_type, 'client backend') = 'client backend' \
           and not (a.usename = session_user and a.application_name ~ '^upgrade(/|$)') \
           and coalesce(a.backend_start >= $1::timestamptz, true) \
           and coalesce(a.backend_start <= $2::timestamptz, true) order by a.pid",
    )
    .bind(since)
    .bind(until)
    .fetch_all(session.connection())
    .await
    .doing(|| "looking at the sessions of others".into())?;
    let other =
        |(pid, user, application, idle, visible, endable)| Other { pid, user, application, idle, visible, endable };
    Ok(found.into_iter().map(other).collect())
}

/// Names sessions by their users and programs, each with how many there are.
pub(super) fn summary(others: &[Other]) -> String {
    let mut count: BTreeMap<String, usize> = BTreeMap::new();
    for other in others {
        let program = match other.application.as_str() {
            "" => String::new(),
            name => format!(" ({name})"),
        };
        *count.entry(format!("{}{program}", other.user)).or_default() += 1;
    }
    let named: Vec<_> = count.into_iter().map(|(who, many)| format!("{many} of {who}")).collect();
    named.join(", ")
}

/// Asks for the privilege to see and end them, before anything is changed.
pub(super) async fn may_end(session: &mut Session, others: &[Other]) -> Result<(), StepError> {
    let user = session.facts().user.clone();
    let beyond: Vec<_> = others.iter().filter(|other| !other.visible || !other.endable).cloned().collect();
    if beyond.is_empty() {
        return Ok(());
    }
    Err(StepError::permanent(format!("user {user} may not end sessions that could write: {}", summary(&beyond)))
        .with_hint(format!("`grant pg_signal_backend, pg_read_all_stats to {user}`")))
}

/// A transaction that was prepared can be committed by anybody at any time, whatever the default.
pub(super) async fn refuse_prepared_transactions(connection: &mut PgConnection) -> Result<(), PostgresError> {
    let prepared: Vec<String> =
        sqlx::query_scalar("select gid from pg_prepared_xacts where database = current_database() order by prepared")
            .fetch_all(connection)
            .await
            .doing(|| "looking for prepared transactions".into())?;
    if prepared.is_empty() {
        return Ok(());
    }
    Err(StepError::permanent(format!("prepared transactions could still write: {}", prepared.join(", ")))
        .with_hint("end each with `commit prepared` or `rollback prepared`, then try again")
        .into())
}

/// Ends the sessions that began since then and before now, and waits until they are gone.
///
/// Returns how many there were.
pub(super) async fn end(
    cx: &Context,
    session: &mut Session,
    since: Option<&str>,
    patience: Patience,
) -> Result<u64, StepError> {
    let until = super::server_time(session.connection()).await?;
    let began = tokio::time::Instant::now();
    let mut ended = std::collections::BTreeSet::new();
    let mut quiet = false;
    loop {
        let left = others(session, since, Some(&until)).await?;
        may_end(session, &left).await?;
        // One that was being opened is listed only when it is: none must be seen twice in a row.
        if left.is_empty() && quiet {
            return Ok(ended.len() as u64);
        }
        quiet = left.is_empty();
        let graceful = began.elapsed() < patience.grace;
        let due: Vec<i32> = left.iter().filter(|other| other.idle || !graceful).map(|other| other.pid).collect();
        if !due.is_empty() {
            sqlx::query("select pg_terminate_backend(pid) from unnest($1::int[]) as pid")
                .bind(&due)
                .execute(session.connection())
                .await
                .doing(|| "ending the sessions of others".into())?;
            ended.extend(due);
        }
        if !left.is_empty() {
            let what = if graceful { "waits for transactions of" } else { "ends" };
            cx.progress(ended.len() as u64, None, format!("{what} {}", summary(&left)));
        }
        if began.elapsed() > patience.grace + patience.end {
            return Err(StepError::transient(format!(
                "sessions do not end within {}: {}",
                Span(patience.end),
                summary(&left)
            ))
            .with_hint("end them with `select pg_terminate_backend(PID)` as a superuser, then `upgrade resume`"));
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = cx.cancelled().cancelled() => return Err(cancelled()),
        }
    }
}
