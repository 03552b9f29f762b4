//! The way back: batch by batch, each put back and forgotten in one transaction.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use tokio::task::JoinSet;
use tokio::time::Instant;
use upgrade_core::context::OnConflict;
use upgrade_core::error::StepError;

use super::statements::built;
use super::workers::Crew;
use crate::error::{Doing, PostgresError};
use crate::identifier::TableName;
use crate::ledger::Ledger;
use crate::session::Session;

/// Names a batch: its range and its number.
pub(crate) type Place = (i32, i32);

/// Tells which rows were left as somebody else made them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Changed {
    pub(crate) rows: u64,
    pub(crate) keys: Vec<String>,
}

/// Lists the batches of the last pass that is not put back yet.
pub(crate) async fn last_pass(
    connection: &mut PgConnection,
    side: &TableName,
) -> Result<Option<(i32, Vec<Place>)>, PostgresError> {
    let there: bool = sqlx::query_scalar("select to_regclass($1) is not null")
        .bind(side.to_string())
        .fetch_one(&mut *connection)
        .await
        .doing(|| "looking for what was kept".into())?;
    if !there {
        return Ok(None);
    }
    let batches: Vec<(i32, i32, i32)> = sqlx::query_as(built(&format!(
        "select pass, range, number from {side} where pass = (select max(pass) from {side}) order by number desc, range"
    )))
    .fetch_all(connection)
    .await
    .doing(|| "reading what was kept".into())?;
    Ok(batches
        .first()
        .map(|(pass, ..)| *pass)
        .map(|pass| (pass, batches.iter().map(|(_, range, number)| (*range, *number)).collect())))
}

/// Sums up the rows that were left as somebody else made them.
pub(crate) async fn changed(session: &mut Session, ledger: &Ledger) -> Result<Changed, PostgresError> {
    let mut sum = Changed::default();
    for (item, value) in ledger.all(session.connection()).await? {
        if let (true, Ok(changed)) = (item.starts_with("changed "), serde_json::from_value::<Changed>(value)) {
            sum.rows += changed.rows;
            sum.keys.extend(changed.keys);
        }
    }
    sum.keys.truncate(5);
    Ok(sum)
}

impl Crew {
    /// Starts the workers that put back one pass; they share its batches.
    pub(crate) fn start_back(
        self: &Arc<Self>,
        pass: i32,
        batches: Vec<Place>,
        workers: usize,
    ) -> JoinSet<Result<(), StepError>> {
        let (batches, next) = (Arc::new(batches), Arc::new(AtomicUsize::new(0)));
        let mut running = JoinSet::new();
        // For a few batches, another session takes longer to open than it saves.
        for _ in 0..workers.clamp(1, batches.len() / 8 + 1) {
            let (crew, batches, next) = (self.clone(), batches.clone(), next.clone());
            running.spawn(async move {
                let done = crew.take_back(pass, &batches, &next).await;
                if done.is_err() {
                    crew.pace.stop();
                }
                done
            });
        }
        running
    }

    async fn take_back(&self, pass: i32, batches: &[Place], next: &AtomicUsize) -> Result<(), StepError> {
        let cx = &self.cx;
        let mut session = self.connect().await?;
        let (ledger, policy) = (Ledger::of(&self.database, cx), self.database.lock_policy());
        let plan = &self.work.plan;
        let restore = plan.restore(&self.side, cx.on_conflict() == OnConflict::Overwrite);
        let (foreign, what) = (plan.foreign(&self.side), format!("putting back a batch of {}", plan.table));
        while self.pace.next(cx, 0).await? {
            let Some(&place) = batches.get(next.fetch_add(1, Ordering::SeqCst)) else { break };
            let began = Instant::now();
            let attempts = AtomicU32::new(0);
            let (restore, foreign, side, ledger, tried) = (&restore, &foreign, &self.side, &ledger, &attempts);
            self.pace.running.fetch_add(1, Ordering::SeqCst);
            let done = policy
                .transaction(cx, &mut session, &what, move |connection, _| {
                    tried.fetch_add(1, Ordering::SeqCst);
                    Box::pin(put_back(connection, ledger, side, restore, foreign.as_deref(), (pass, place)))
                })
                .await;
            self.pace.running.fetch_sub(1, Ordering::SeqCst);
            self.pace.gave_way.fetch_add(attempts.load(Ordering::SeqCst).saturating_sub(1), Ordering::SeqCst);
            let (kept, restored) = done?;
            self.pace.after(cx, 0, kept, restored, began.elapsed()).await?;
        }
        session.close().await;
        Ok(())
    }
}

/// Puts the rows of a batch back and takes its bookmark with them, in one transaction.
async fn put_back(
    connection: &mut PgConnection,
    ledger: &Ledger,
    side: &TableName,
    restore: &str,
    foreign: Option<&str>,
    (pass, (range, number)): (i32, Place),
) -> Result<(u64, u64), PostgresError> {
    // Rows and bookmark are lost together in a crash, as on the way forward; the end is synchronous.
    sqlx::raw_sql("set local synchronous_commit = off").execute(&mut *connection).await?;
    let restored: i64 = sqlx::query_scalar(built(restore))
        .bind(pass)
        .bind(range)
        .bind(number)
        .fetch_one(&mut *connection)
        .await
        .doing(|| "putting rows back".into())?;
    if let Some(foreign) = foreign {
        let (rows, keys): (i64, Vec<String>) = sqlx::query_as(built(foreign))
            .bind(pass)
            .bind(range)
            .bind(number)
            .fetch_one(&mut *connection)
            .await
            .doing(|| "looking for rows that were changed since".into())?;
        if rows > 0 {
            let changed = Changed { rows: u64::try_from(rows).unwrap_or(0), keys };
            ledger.put(connection, &format!("changed {pass} {range} {number}"), &changed).await?;
        }
    }
    let kept: Option<i64> = sqlx::query_scalar(built(&format!(
        "delete from {side} where pass = $1 and range = $2 and number = $3 returning rows"
    )))
    .bind(pass)
    .bind(range)
    .bind(number)
    .fetch_optional(connection)
    .await
    .doing(|| "forgetting a batch".into())?;
    let unsigned = |count: i64| u64::try_from(count).unwrap_or(0);
    Ok((unsigned(kept.unwrap_or(0)), unsigned(restored)))
}
