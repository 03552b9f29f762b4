//! Strong locks under live traffic: tried for a moment, let go, tried again when the way is free.
//!
//! A statement that waits for a strong lock holds up everybody who comes after it: the lock queue is
//! served in order. So none waits for longer than `lock_timeout`; between two attempts, those who
//! were in the way are watched, and the next attempt comes as soon as they are gone.
//!
//! ```text
//!             ┌──────────────── their transactions ended, or 1 s ───────────────┐
//!             ▼                                                                 │
//!   attempt (lock_timeout) ── 55P03, 40P01 ──► watch who was in the way ────────┤
//!             │                                                                 │
//!           done                                       lock_budget used up ──► error that names them
//! ```

use std::marker::PhantomData;
use std::pin::Pin;
use std::time::Duration;

use sqlx::{AssertSqlSafe, PgConnection};
use tokio::time::Instant;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::units::Span;

use crate::error::{Doing, PostgresError, cancelled, not_cancelled};
use crate::session::Session;

/// How often those in the way are looked at.
const LOOK: Duration = Duration::from_millis(25);

/// Says how long a statement waits for locks, and what is done about those in the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockPolicy {
    /// How long one attempt waits.
    pub lock_timeout: Duration,
    /// How long attempts are made, all in all.
    pub budget: Duration,
    /// The longest pause between two attempts.
    pub pause: Duration,
    /// Ends sessions in the way that have been idle in their transaction for this long.
    pub end_idle_in_transaction: Option<Duration>,
}

impl Default for LockPolicy {
    fn default() -> Self {
        Self {
            lock_timeout: Duration::from_millis(50),
            budget: Duration::from_secs(300),
            pause: Duration::from_secs(1),
            end_idle_in_transaction: None,
        }
    }
}

/// Carries one attempt at work on a connection.
pub type Attempt<'c, T> = Pin<Box<dyn Future<Output = Result<T, PostgresError>> + Send + 'c>>;

/// Lets an attempt borrow what its caller holds: `'a` outlives every `'c`. A closure ignores it.
#[derive(Debug, Clone, Copy)]
pub struct Scope<'c, 'a>(PhantomData<&'c &'a ()>);

/// Describes a session in the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocker {
    /// The server's process.
    pub pid: i32,
    /// What tells its transaction from the next one.
    transaction: String,
    /// Who it is and what it does, in one line.
    pub description: String,
}

impl LockPolicy {
    /// Runs `work` in a transaction, again and again until it had its locks.
    ///
    /// `what` names it in messages: "altering public.orders".
    ///
    /// ```
    /// # use upgrade_core::context::Context;
    /// # use upgrade_postgres::{PostgresError, locking::LockPolicy, session::Session};
    /// # async fn drop_column(cx: &Context, session: &mut Session, sql: &'static str) -> Result<(), PostgresError> {
    /// LockPolicy::default()
    ///     .transaction(cx, session, "dropping a column", move |connection, _| {
    ///         Box::pin(async move {
    ///             sqlx::raw_sql(sql).execute(connection).await?;
    ///             Ok(())
    ///         })
    ///     })
    ///     .await
    /// # }
    /// ```
    ///
    /// # Guarantees
    /// `work` is called anew for each attempt, all of the one before undone. When it has returned
    /// and no error is returned, the transaction is committed.
    ///
    /// # Errors
    /// What the work says; that the budget is used up, and who was in the way. When the connection
    /// breaks in the commit, nobody knows whether it was done: only what the transaction wrote can
    /// tell (see [`Ledger`](crate::ledger::Ledger)).
    pub async fn transaction<'a, T: Send>(
        &self,
        cx: &Context,
        session: &mut Session,
        what: &str,
        work: impl for<'c> FnMut(&'c mut PgConnection, Scope<'c, 'a>) -> Attempt<'c, T> + Send,
    ) -> Result<T, PostgresError> {
        self.attempts(cx, session, what, true, work).await
    }

    /// Runs `work` outside of a transaction, for what cannot run inside one, with the same attempts.
    ///
    /// # Errors
    /// As [`LockPolicy::transaction`]. Before the next attempt, `work` itself clears away what a
    /// failed one left.
    pub async fn outside_transaction<'a, T: Send>(
        &self,
        cx: &Context,
        session: &mut Session,
        what: &str,
        work: impl for<'c> FnMut(&'c mut PgConnection, Scope<'c, 'a>) -> Attempt<'c, T> + Send,
    ) -> Result<T, PostgresError> {
        self.attempts(cx, session, what, false, work).await
    }

    async fn attempts<'a, T: Send>(
        &self,
        cx: &Context,
        session: &mut Session,
        what: &str,
        transaction: bool,
        mut work: impl for<'c> FnMut(&'c mut PgConnection, Scope<'c, 'a>) -> Attempt<'c, T> + Send,
    ) -> Result<T, PostgresError> {
        let timeout = self.lock_timeout.as_millis().max(1);
        let (begin, end, give_up) = match transaction {
            true => (format!("begin; set local lock_timeout = {timeout}"), "commit", "rollback"),
            false => (format!("set lock_timeout = {timeout}"), "set lock_timeout = 0", "set lock_timeout = 0"),
        };
        let began = Instant::now();
        let mut watch: Option<Session> = None;
        let mut blockers = Vec::new();
        let mut number: u64 = 0;
        loop {
            not_cancelled(cx)?;
            number += 1;
            let (pid, canceller) = (session.facts().pid, session.canceller());
            let connection = session.connection();
            let trying = async {
                sqlx::raw_sql(AssertSqlSafe(begin.clone())).execute(&mut *connection).await?;
                let done = work(&mut *connection, Scope(PhantomData)).await;
                let ended = match &done {
                    Ok(_) => sqlx::raw_sql(end).execute(&mut *connection).await.doing(|| format!("committing {what}")),
                    Err(_) => {
                        sqlx::raw_sql(give_up).execute(&mut *connection).await.doing(|| format!("giving up {what}"))
                    }
                };
                // Of two errors the first tells more; on a broken connection the server rolls back by itself.
                let done = done?;
                ended.map(|_| done)
            };
            let trying = canceller.cancels(cx, trying);
            let done = match &mut watch {
                None => trying.await,
                Some(watch) => {
                    tokio::pin!(trying);
                    loop {
                        tokio::select! {
                            biased;
                            done = &mut trying => break done,
                            () = tokio::time::sleep(LOOK) => {
                                let found = blockers_of(watch, pid).await?;
                                if !found.is_empty() {
                                    blockers = found;
                                }
                            }
                        }
                    }
                }
            };
            let error = match done {
                Err(error) if error.is_contention() => error,
                done => {
                    if let Some(watch) = watch {
                        watch.close().await;
                    }
                    return done;
                }
            };
            let waited = began.elapsed();
            if waited >= self.budget {
                return Err(self.given_up(what, waited, number, &blockers, error).into());
            }
            let watch = match &mut watch {
                Some(watch) => watch,
                None => watch.insert(session.sibling("upgrade").await?),
            };
            cx.progress(0, None, waiting(what, waited, &blockers));
            self.until_free(cx, watch, &mut blockers, self.budget.saturating_sub(waited)).await?;
        }
    }

    /// Waits until those in the way are gone, or until it is time for another attempt anyway.
    async fn until_free(
        &self,
        cx: &Context,
        watch: &mut Session,
        blockers: &mut Vec<Blocker>,
        left: Duration,
    ) -> Result<(), PostgresError> {
        // Two orchestrators that meet must not meet again and again.
        let jitter = f64::from(watch.facts().pid.rem_euclid(97)) / 97.0;
        let pause = if blockers.is_empty() { self.pause / 20 } else { self.pause };
        let until = Instant::now() + pause.mul_f64(0.5 + 0.5 * jitter).min(left);
        while Instant::now() < until {
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = cx.cancelled().cancelled() => return Err(cancelled().into()),
            }
            if blockers.is_empty() {
                continue;
            }
            if let Some(longest) = self.end_idle_in_transaction {
                end_idle(watch, blockers, longest).await?;
            }
            if !any_left(watch, blockers).await? {
                blockers.clear();
                return Ok(());
            }
        }
        Ok(())
    }

    /// Says that the budget is used up, and who was in the way.
    pub(crate) fn given_up(
        &self,
        what: &str,
        waited: Duration,
        attempts: u64,
        blockers: &[Blocker],
        error: PostgresError,
    ) -> StepError {
        let who = match blockers {
            [] => "nobody was seen in the way".to_owned(),
            some => some.iter().map(|blocker| blocker.description.clone()).collect::<Vec<_>>().join("; "),
        };
        let hint = match blockers {
            [] => "try again, or raise `lock_budget` on the target".to_owned(),
            [first, ..] => format!(
                "end what is in the way (`select pg_terminate_backend({})`), raise `lock_budget` on the target, or set \
                 `end_idle_in_transaction` if it only sits there",
                first.pid
            ),
        };
        let error = StepError::from(error);
        StepError::transient(format!("{what}: no lock in {attempts} attempts within {}: {who}", Span(waited)))
            .with_cause(&error)
            .with_hint(hint)
    }
}

fn waiting(what: &str, waited: Duration, blockers: &[Blocker]) -> String {
    match blockers {
        [] => format!("{what}: waits for a lock, {} so far", Span(waited)),
        [first, rest @ ..] => {
            let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
            format!("{what}: waits for a lock, {} so far, behind {}{more}", Span(waited), first.description)
        }
    }
}

/// Finds out who is in the way of a session that waits for a lock.
///
/// # Errors
/// The connection broke.
pub(crate) async fn blockers_of(watch: &mut Session, pid: i32) -> Result<Vec<Blocker>, PostgresError> {
    let rows: Vec<(i32, Option<String>, String)> = sqlx::query_as(
        "select a.pid, \
           (select min(l.virtualtransaction) from pg_locks l where l.pid = a.pid and l.granted), \
           format('pid %s (%s%s, %s, transaction of %s s): %s', a.pid, coalesce(a.usename, a.backend_type, 'unknown'), \
             case when a.application_name <> '' then ' ' || a.application_name else '' end, \
             coalesce(a.state, 'state not visible'), \
             coalesce(round(extract(epoch from clock_timestamp() - a.xact_start), 1)::text, '?'), \
             coalesce(left(regexp_replace(a.query, '\\s+', ' ', 'g'), 100), '?')) \
         from unnest(pg_blocking_pids($1)) as b(pid) join pg_stat_activity a on a.pid = b.pid \
         where b.pid <> 0 group by a.pid, a.usename, a.backend_type, a.application_name, a.state, a.xact_start, a.query",
    )
    .bind(pid)
    .fetch_all(watch.connection())
    .await
    .doing(|| "looking who holds the lock".into())?;
    Ok(rows
        .into_iter()
        .filter_map(|(pid, transaction, description)| {
            transaction.map(|transaction| Blocker { pid, transaction, description })
        })
        .collect())
}

async fn any_left(watch: &mut Session, blockers: &[Blocker]) -> Result<bool, PostgresError> {
    // Everybody may see pg_locks; what another user's session does, not everybody may.
    sqlx::query_scalar(
        "select exists (select from pg_locks l join unnest($1::int[], $2::text[]) as b(pid, transaction) \
         on l.pid = b.pid and l.virtualtransaction = b.transaction where l.granted)",
    )
    .bind(blockers.iter().map(|blocker| blocker.pid).collect::<Vec<_>>())
    .bind(blockers.iter().map(|blocker| blocker.transaction.clone()).collect::<Vec<_>>())
    .fetch_one(watch.connection())
    .await
    .doing(|| "looking whether the lock is free".into())
}

/// Ends those in the way that have been idle in their transaction for that long.
pub(crate) async fn end_idle(
    watch: &mut Session,
    blockers: &[Blocker],
    longest: Duration,
) -> Result<(), PostgresError> {
    sqlx::query(
        "select pg_terminate_backend(pid) from pg_stat_activity where pid = any($1) \
         and state like 'idle in transaction%' and state_change < clock_timestamp() - make_interval(secs => $2)",
    )
    .bind(blockers.iter().map(|blocker| blocker.pid).collect::<Vec<_>>())
    .bind(longest.as_secs_f64())
    .execute(watch.connection())
    .await
    .doing(|| "ending a session that is idle in its transaction".into())?;
    Ok(())
}
