//! Strong locks under live traffic: tried for a moment, let go, tried again when the way is free.
//!
//! A statement that waits for a strong lock holds up everybody who comes after it: the lock queue is
//! served in order. So none waits for longer than `lock_timeout`; between two attempts, those who
//! were in the way are watched, and the next attempt comes as soon as they are gone.
//!
//! ```text
//!             ┌──────────────── their transactions ended, or 5 s ───────────────┐
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
/// How long a look may take: it must never hold up the work itself.
const GLANCE: Duration = Duration::from_secs(2);
/// The first pause where nobody was seen in the way; each one after that is twice as long.
const BLIND: Duration = Duration::from_millis(50);
/// Finds texts between quotes, and between dollars, in a statement, also where its end is cut off.
const QUOTED: &str = r"'([^'\\]|\\.|'')*('|$)";
const DOLLARS: &str = r"\$(\w*?)\$.*?(\$\1\$|$)";
/// How often a wait is reported.
const REPORT: Duration = Duration::from_secs(1);

/// Says how long a statement waits for locks, and what is done about those in the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockPolicy {
    /// How long one attempt waits.
    pub lock_timeout: Duration,
    /// How long attempts are made, all in all.
    pub budget: Duration,
    /// The longest pause between two attempts. The next one comes as soon as those who were seen in
    /// the way are gone; the pause is for locks that are let go of within a transaction.
    pub pause: Duration,
    /// Ends sessions in the way that have been idle in their transaction for this long.
    pub end_idle_in_transaction: Option<Duration>,
}

impl Default for LockPolicy {
    fn default() -> Self {
        Self {
            lock_timeout: Duration::from_millis(50),
            budget: Duration::from_secs(300),
            pause: Duration::from_secs(5),
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
        let superuser = session.facts().superuser;
        let (end, give_up) = match transaction {
            true => ("commit", "rollback"),
            false => ("set lock_timeout = 0", "set lock_timeout = 0"),
        };
        let began = Instant::now();
        let mut watch: Option<Session> = None;
        let mut blockers = Vec::new();
        let mut number: u64 = 0;
        loop {
            not_cancelled(cx)?;
            number += 1;
            let begin = self.begin(transaction, superuser, !blockers.is_empty());
            let (pid, canceller) = (session.facts().pid, session.canceller());
            let connection = session.connection();
            let trying = async {
                sqlx::raw_sql(AssertSqlSafe(begin)).execute(&mut *connection).await?;
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
                Some(seen) => {
                    tokio::pin!(trying);
                    let looking = async {
                        loop {
                            tokio::time::sleep(LOOK.min(self.lock_timeout / 5)).await;
                            match glance(blockers_of(seen, pid)).await {
                                Ok(found) if found.is_empty() => {}
                                Ok(found) => blockers = found,
                                Err(_) => break,
                            }
                        }
                    };
                    // What watches may break, and the work goes on; it is opened anew for the next wait.
                    let broke = tokio::select! {
                        biased;
                        done = &mut trying => Ok(done),
                        () = looking => Err(()),
                    };
                    match broke {
                        Ok(done) => done,
                        Err(()) => {
                            watch = None;
                            trying.await
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
            if watch.is_none() {
                // Where no more connections are to be had, one waits without knowing for whom.
                watch = session.sibling(cx, "upgrade").await.ok();
                not_cancelled(cx)?;
                if let Some(watch) = &mut watch {
                    // The first look takes the longest, and the next attempt may be a short one.
                    let _ = glance(blockers_of(watch, pid)).await;
                }
            }
            if self.until_free(cx, what, began, &mut watch, &mut blockers, number).await.is_err() {
                not_cancelled(cx)?;
                watch = None;
            }
        }
    }

    /// Spells how an attempt begins.
    fn begin(&self, transaction: bool, superuser: bool, in_the_way: bool) -> String {
        let timeout = self.lock_timeout.as_millis().max(1);
        if !transaction {
            return format!("set lock_timeout = {timeout}");
        }
        // Those who were in the way still are: the attempt is for a lock that is let go of within a
        // transaction, which is rare, and everybody who queues behind it pays for it.
        let timeout = if in_the_way { timeout.div_ceil(5) } else { timeout };
        // Deadlocks are found, and vacuums that stand in the way step aside, only after
        // deadlock_timeout; a superuser can have that before the attempt is over.
        let early = match superuser {
            true => format!("; set local deadlock_timeout = {}", (timeout / 2).clamp(1, 1000)),
            false => String::new(),
        };
        format!("begin; set local lock_timeout = {timeout}{early}")
    }

    /// Waits until those in the way are gone, or until it is time for another attempt anyway.
    async fn until_free(
        &self,
        cx: &Context,
        what: &str,
        began: Instant,
        watch: &mut Option<Session>,
        blockers: &mut Vec<Blocker>,
        number: u64,
    ) -> Result<(), PostgresError> {
        // Two orchestrators that meet must not meet again and again.
        let jitter = f64::from(watch.as_ref().map_or(50, |watch| watch.facts().pid.rem_euclid(97))) / 97.0;
        let pause = match blockers.is_empty() {
            true => self.pause.min(BLIND * 2_u32.pow(u32::try_from(number.clamp(1, 5) - 1).unwrap_or(0))),
            false => self.pause,
        };
        let left = self.budget.saturating_sub(began.elapsed());
        let until = Instant::now() + pause.mul_f64(0.5 + 0.5 * jitter).min(left);
        let mut report = Instant::now();
        while Instant::now() < until {
            if Instant::now() >= report {
                cx.progress(0, None, waiting(what, began.elapsed(), blockers));
                report += REPORT;
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = cx.cancelled().cancelled() => return Err(cancelled().into()),
            }
            let Some(watch) = watch.as_mut().filter(|_| !blockers.is_empty()) else { continue };
            if let Some(longest) = self.end_idle_in_transaction {
                glance(end_idle(watch, blockers, longest)).await?;
            }
            if !glance(any_left(watch, blockers)).await? {
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

/// Awaits a look at the server, but not for ever.
async fn glance<T>(looking: impl Future<Output = Result<T, PostgresError>>) -> Result<T, PostgresError> {
    tokio::time::timeout(GLANCE, looking).await.unwrap_or_else(|_| Err(sqlx::Error::PoolTimedOut.into()))
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
    // Texts in other people's statements are nobody's business here: they may be passwords.
    let rows: Vec<(i32, Option<String>, String)> = sqlx::query_as(
        "select a.pid, \
           (select min(l.virtualtransaction) from pg_catalog.pg_locks l where l.pid = a.pid and l.granted), \
           pg_catalog.concat('pid ', a.pid::text, ' (', coalesce(a.usename::text, a.backend_type, 'unknown'), \
             case when a.application_name <> '' then pg_catalog.concat(' ', a.application_name) else '' end, ', ', \
             coalesce(a.state, 'state not visible'), ', transaction of ', \
             coalesce(pg_catalog.round(extract(epoch from pg_catalog.clock_timestamp() - a.xact_start)::numeric, 1)::text, '?'), \
             ' s): ', \
             coalesce(pg_catalog.left(pg_catalog.regexp_replace(pg_catalog.regexp_replace(pg_catalog.regexp_replace( \
                 a.query, $3, '''…''', 'g'), $2, '''…''', 'g'), \
               '[[:space:][:cntrl:]]+', ' ', 'g'), 100), '?')) \
         from pg_catalog.unnest(pg_catalog.pg_blocking_pids($1)) as b(pid) \
         join pg_catalog.pg_stat_activity a on a.pid = b.pid \
         where b.pid <> 0 group by a.pid, a.usename, a.backend_type, a.application_name, a.state, a.xact_start, a.query",
    )
    .bind(pid)
    .bind(QUOTED)
    .bind(DOLLARS)
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
        "select exists (select from pg_catalog.pg_locks l join pg_catalog.unnest($1::int[], $2::text[]) as b(pid, transaction) \
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
        "select pg_catalog.pg_terminate_backend(pid) from pg_catalog.pg_stat_activity where pid = any($1) \
         and state like 'idle in transaction%' and pg_catalog.pg_has_role(usesysid, 'USAGE') \
         and state_change < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $2)",
    )
    .bind(blockers.iter().map(|blocker| blocker.pid).collect::<Vec<_>>())
    .bind(longest.as_secs_f64())
    .execute(watch.connection())
    .await
    .doing(|| "ending a session that is idle in its transaction".into())?;
    Ok(())
}
