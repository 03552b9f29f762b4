//! The walk forward: workers over ranges, passes until nothing is left.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use sqlx::PgConnection;
use tokio::task::JoinSet;
use tokio::time::Instant;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use super::bookmark::{self, Range};
use super::pace::Pace;
use super::statements::{Work, built, settings};
use crate::error::{Doing, PostgresError};
use crate::identifier::TableName;
use crate::session::Session;
use crate::target::Database;

/// Knows everything that a worker needs.
#[derive(Debug)]
pub(crate) struct Crew {
    pub(crate) cx: Context,
    pub(crate) database: Arc<Database>,
    pub(crate) work: Work,
    pub(crate) side: TableName,
    pub(crate) pace: Arc<Pace>,
}

/// Tells what one batch did.
struct Batch {
    upto: Option<Vec<String>>,
    asked: u32,
    rows: i64,
}

impl Crew {
    /// Starts the workers of one pass; they share its ranges.
    pub(crate) fn start(
        self: &Arc<Self>,
        pass: i32,
        ranges: &Arc<Vec<Range>>,
        workers: usize,
    ) -> JoinSet<Result<(), StepError>> {
        let next = Arc::new(AtomicUsize::new(0));
        let mut running = JoinSet::new();
        for _ in 0..workers.clamp(1, ranges.len().max(1)) {
            let (crew, ranges, next) = (self.clone(), ranges.clone(), next.clone());
            running.spawn(async move {
                let done = crew.take_ranges(pass, &ranges, &next).await;
                if done.is_err() {
                    crew.pace.stop();
                }
                done
            });
        }
        running
    }

    async fn take_ranges(&self, pass: i32, ranges: &[Range], next: &AtomicUsize) -> Result<(), StepError> {
        let mut session = self.connect().await?;
        loop {
            let at = next.fetch_add(1, Ordering::SeqCst);
            let Some(range) = ranges.get(at) else { break };
            let place = (pass, i32::try_from(at).unwrap_or(i32::MAX));
            if !self.walk(&mut session, place, range).await? {
                break;
            }
        }
        session.close().await;
        Ok(())
    }

    pub(crate) async fn connect(&self) -> Result<Session, StepError> {
        let mut session = self.database.connect(&self.cx).await?;
        session.execute(&self.cx, settings(&self.work.plan)).await.doing(|| "setting up the session".into())?;
        Ok(session)
    }

    /// Walks one range from its bookmark to its end; says false if it was stopped before.
    async fn walk(&self, session: &mut Session, place: (i32, i32), range: &Range) -> Result<bool, StepError> {
        let cx = &self.cx;
        let found = bookmark::read(session.connection(), &self.side, place).await?;
        let (mut number, mut done) = (found.number, found.done);
        let mut after = found.after.or_else(|| range.after.clone());
        let (bound, write) = (self.work.bound(place.0 > 0), self.work.write(&self.side));
        let policy = self.database.lock_policy();
        let what = format!("a batch of {}", self.work.plan.table);
        let mut size = self.pace.first_size();
        while !done {
            let asked = size.rows();
            if !self.pace.next(cx, asked).await? {
                return Ok(false);
            }
            let began = Instant::now();
            let attempts = AtomicU32::new(0);
            let (rows, from) = (asked, &after);
            let (bound, write, tried) = (&bound, &write, &attempts);
            self.pace.running.fetch_add(1, Ordering::SeqCst);
            let batch = policy
                .transaction(cx, session, &what, move |connection, _| {
                    // Whoever is in the way holds few rows: the fewer are asked for, the more can be done.
                    let rows = (rows >> tried.fetch_add(1, Ordering::SeqCst).min(31)).max(1);
                    Box::pin(batch(connection, bound, write, place, number, from, &range.upto, rows))
                })
                .await;
            self.pace.running.fetch_sub(1, Ordering::SeqCst);
            let tried = attempts.load(Ordering::SeqCst);
            if tried > 1 {
                self.pace.gave_way.fetch_add(tried - 1, Ordering::SeqCst);
            }
            let batch = match batch {
                Ok(batch) => batch,
                // Too much for one value of the server: the keys and what they held.
                Err(error) if matches!(error.code(), Some("54000")) && rows > 1 => {
                    size.shrink();
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let took = began.elapsed();
            let walked = if batch.upto.is_some() { i64::from(batch.asked) } else { batch.rows };
            if batch.upto.is_some() && tried <= 1 {
                size.learn(batch.asked, took, self.pace.aim());
            } else if tried > 1 {
                size.shrink();
            }
            number += 1;
            done = batch.upto.is_none();
            after = batch.upto;
            let unsigned = |count: i64| u64::try_from(count).unwrap_or(0);
            self.pace.after(cx, asked, unsigned(walked), unsigned(batch.rows), took).await?;
        }
        Ok(true)
    }
}

/// Writes the rows after a key and, in the same transaction, that they are written.
#[allow(clippy::too_many_arguments)]
async fn batch(
    connection: &mut PgConnection,
    bound: &str,
    write: &str,
    (pass, range): (i32, i32),
    number: i32,
    after: &Option<Vec<String>>,
    end: &Option<Vec<String>>,
    asked: u32,
) -> Result<Batch, PostgresError> {
    sqlx::raw_sql("set local synchronous_commit = off").execute(&mut *connection).await?;
    let upto: Option<Vec<String>> = sqlx::query_scalar(built(bound))
        .bind(after)
        .bind(end)
        .bind(i64::from(asked) - 1)
        .fetch_optional(&mut *connection)
        .await
        .doing(|| "finding the end of a batch".into())?;
    let (rows, still): (i64, bool) = sqlx::query_as(built(write))
        .bind(after)
        .bind(upto.as_ref().or(end.as_ref()))
        .bind(pass)
        .bind(range)
        .bind(number)
        .bind(upto.is_none())
        .bind(if upto.is_some() { i64::from(asked) } else { 0 })
        .fetch_one(&mut *connection)
        .await
        .doing(|| "writing a batch".into())?;
    if still {
        return Err(still_pending().into());
    }
    Ok(Batch { upto, asked, rows })
}

/// Says that the walk would have no end, or write rows twice.
fn still_pending() -> StepError {
    StepError::permanent(
        "rows that the backfill has written still match its condition: it would write them again and again",
    )
    .with_hint(
        "state a `where` that a written row no longer matches; or, if each row is to be written exactly once and rows \
             that are inserted meanwhile need nothing, `once: true`; a trigger that changes the value does this too",
    )
}
