//! What goes on beside the workers: progress, vacuum, an operator's pause, the end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::units::Span;

use super::budget::pause_asked;
use super::pace::Pace;
use super::vacuum::Cadence;
use crate::error::{Doing, PostgresError, cancelled};
use crate::ledger::Ledger;
use crate::session::Session;
use crate::target::Database;

/// Between two looks at the dead rows.
const TICK: Duration = Duration::from_millis(100);
/// At every so many of them, progress is reported and the operator's wish asked for.
const REPORT: u64 = 5;

/// Conducts the workers of a backfill, in either direction.
pub(crate) struct Conductor {
    pub(crate) cx: Context,
    pub(crate) database: Arc<Database>,
    pub(crate) ledger: Ledger,
    pub(crate) pace: Arc<Pace>,
    pub(crate) cadence: Option<Cadence>,
    pub(crate) total: Option<u64>,
    /// "filling public.orders"
    pub(crate) doing: String,
    pub(crate) began: Instant,
    /// Rows that earlier calls walked.
    pub(crate) before: u64,
}

impl Conductor {
    /// Waits for workers, all of them, also after one has failed.
    pub(crate) async fn until_done(
        &self,
        session: &mut Session,
        mut workers: JoinSet<Result<(), StepError>>,
    ) -> Result<(), StepError> {
        let mut failed: Option<StepError> = None;
        let mut vacuum: Option<JoinHandle<()>> = None;
        let mut ticks: u64 = 0;
        let mut tick = tokio::time::interval_at(Instant::now() + TICK, TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let error = tokio::select! {
                ended = workers.join_next() => match ended {
                    None => break,
                    Some(Ok(done)) => done.err(),
                    Some(Err(panic)) => Some(StepError::unknown("a worker of the backfill ended early").with_cause(&panic)
                        .with_hint("this is a defect of the step kind: report it; `upgrade resume` goes on")),
                },
                _ = tick.tick() => {
                    ticks += 1;
                    self.vacuum_if_due(&mut vacuum);
                    if ticks.is_multiple_of(REPORT) { self.look(session).await.err().map(Into::into) } else { None }
                }
            };
            if let Some(error) = error {
                self.pace.stop();
                failed.get_or_insert(error);
            }
        }
        if let Some(vacuum) = vacuum {
            // It is bounded by the table; what runs on behind would hold up what comes next.
            let _ = vacuum.await;
        }
        failed.map_or(Ok(()), Err)
    }

    async fn look(&self, session: &mut Session) -> Result<(), PostgresError> {
        let paused = pause_asked(session, &self.ledger).await?;
        self.pace.ask_pause(paused);
        self.report(paused);
        Ok(())
    }

    fn vacuum_if_due(&self, vacuum: &mut Option<JoinHandle<()>>) {
        let free = vacuum.as_ref().is_none_or(JoinHandle::is_finished);
        let Some(cadence) = self.cadence.as_ref().filter(|cadence| free && cadence.is_due(&self.pace)) else { return };
        let (cadence, cx, database, pace) =
            (cadence.clone(), self.cx.clone(), self.database.clone(), self.pace.clone());
        *vacuum = Some(tokio::spawn(async move {
            if let Err(error) = cadence.run(&cx, &database, &pace).await {
                // The rows are what counts: without it the table only grows.
                tracing::warn!(%error, table = %cadence.table, "the vacuum beside a backfill failed");
            }
        }));
    }

    fn report(&self, paused: bool) {
        let walked = self.pace.walked.load(Ordering::SeqCst);
        let speed = walked.saturating_sub(self.before) as f64 / self.began.elapsed().as_secs_f64().max(0.001);
        let mut message = format!("{}: {speed:.0} rows/s", self.doing);
        if paused {
            message = format!("{}: paused by the item `pause` in the ledger", self.doing);
        } else if let Some(total) = self.total.filter(|total| speed > 1.0 && *total > walked) {
            let left = Duration::from_secs(((total - walked) as f64 / speed).ceil() as u64);
            message.push_str(&format!(", about {} left", Span(left)));
        }
        if self.pace.share() < 1.0 && !paused {
            message.push_str(&format!(", held to {:.0} % of the time", self.pace.share() * 100.0));
        }
        self.cx.progress(walked, self.total.map(|total| total.max(walked)), message);
    }

    /// Waits until those who were writing when it was called have ended: what they insert is seen
    /// from then on.
    pub(crate) async fn writers_gone(&self, session: &mut Session, relation: Option<&str>) -> Result<(), StepError> {
        let patience = self.database.lock_policy().budget;
        let began = Instant::now();
        let pid = session.facts().pid;
        let writers: Vec<String> = sqlx::query_scalar(
            "select distinct virtualtransaction from pg_locks where mode = 'RowExclusiveLock' and granted and pid <> $1 \
             and database = (select oid from pg_database where datname = current_database()) \
             and case when $2::text is null then relation >= 16384 \
               else relation in (select relid from pg_partition_tree(to_regclass($2)) union all select to_regclass($2)) end",
        )
        .bind(pid)
        .bind(relation)
        .fetch_all(session.connection())
        .await
        .doing(|| "looking who writes to the table".into())?;
        if writers.is_empty() {
            return Ok(());
        }
        loop {
            let left: i64 = sqlx::query_scalar(
                "select count(distinct virtualtransaction) from pg_locks where virtualtransaction = any($1) and granted",
            )
            .bind(&writers)
            .fetch_one(session.connection())
            .await
            .doing(|| "waiting for those who write to the table".into())?;
            if left == 0 {
                return Ok(());
            }
            if began.elapsed() > patience {
                return Err(StepError::transient(format!(
                    "{left} transactions that write to the table have not ended for {}: rows of theirs may be missing",
                    Span(patience)
                ))
                .with_hint("end them (`select pid, query from pg_stat_activity where xact_start < now() - interval '1 min'`), then `upgrade resume`"));
            }
            self.cx.progress(
                self.pace.walked.load(Ordering::SeqCst),
                self.total,
                format!("{}: waits for {left} transactions that write to the table", self.doing),
            );
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(20)) => {}
                () = self.cx.cancelled().cancelled() => return Err(cancelled()),
            }
        }
    }
}
