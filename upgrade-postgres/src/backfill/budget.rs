//! What a backfill may cost others: the limits, and the measurements that are held against them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::units::{Share, Span};

use super::pace::Pace;
use super::statements::built;
use super::throttle::Window;
use crate::error::{Doing, PostgresError, cancelled};
use crate::ledger::Ledger;
use crate::session::{Session, application_name};
use crate::target::Database;

/// How many measurements without a batch are kept to compare with.
const QUIET: usize = 1000;
/// Between two probes.
const INTERVAL: Duration = Duration::from_millis(10);
/// How long the server is watched before a batch runs, for a limit relative to that.
const BASELINE: Duration = Duration::from_secs(3);
/// How often that is done again, as the load of a day changes.
const BASELINE_AGAIN: Duration = Duration::from_secs(60);
/// Between two looks at replication and locks.
const LOOK: Duration = Duration::from_millis(250);

/// States what a backfill may cost others. At least one limit.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BudgetConfig {
    /// A query as the application makes it, cheap and typical; its latency is measured all the time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<String>,
    /// The most that the 95th percentile of the probe's latency may be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p95: Option<Span>,
    /// The most that it may grow over what it is while no batch runs, as long as anybody else is at
    /// work on the server: `10%`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_increase: Option<Share>,
    /// The pause between two probes. Default 10 ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<Span>,
    /// The most that any standby may lag behind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replication_lag: Option<Span>,
    /// The most sessions that may wait for a lock of the backfill at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock_waits: Option<u32>,
}

impl BudgetConfig {
    /// Says what is wrong with it: the key, and why.
    pub fn problem(&self) -> Option<(&'static str, &'static str)> {
        let limits_probe = self.p95.is_some() || self.max_increase.is_some();
        match &self.probe {
            Some(probe) if probe.trim().is_empty() => Some(("probe", "the query is empty")),
            Some(_) if !limits_probe => Some(("probe", "it needs `p95` or `max_increase` to be held against")),
            None if limits_probe => Some(("p95", "it needs a `probe` whose latency is measured")),
            None if self.replication_lag.is_none() && self.lock_waits.is_none() => {
                Some(("probe", "no limit is stated"))
            }
            _ if self.max_increase.is_some_and(|share| share.0 <= 0.0) => {
                Some(("max_increase", "it must be more than 0%"))
            }
            _ if self.p95.is_some_and(|span| span.0.is_zero()) => Some(("p95", "it must be more than nothing")),
            _ => None,
        }
    }

    /// Says in a few words what is held.
    pub fn describe(&self) -> String {
        let limits = [
            self.p95.map(|p95| format!("p95 of the probe at most {p95}")),
            self.max_increase.map(|share| format!("p95 of the probe at most {share} more than without")),
            self.replication_lag.map(|lag| format!("replication lag at most {lag}")),
            self.lock_waits.map(|waits| format!("at most {waits} sessions waiting for it")),
        ];
        limits.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

/// Measures while batches run, and tells the pace.
pub(crate) struct Monitor {
    pub(crate) config: BudgetConfig,
    pub(crate) pace: Arc<Pace>,
}

impl Monitor {
    /// Measures until the backfill stops.
    pub(crate) async fn run(self, cx: Context, database: Arc<Database>) -> Result<(), StepError> {
        let mut session = database.connect(&cx).await?;
        let own = application_name(&cx.marker());
        let measured = self.measure(&cx, &mut session, &own).await;
        if measured.is_err() {
            // Not held is not to be: without the measurement nothing goes on.
            self.pace.stop();
        }
        session.close().await;
        Ok(measured?)
    }

    async fn measure(&self, cx: &Context, session: &mut Session, own: &str) -> Result<(), PostgresError> {
        let stated = self.config.p95.map_or(f64::INFINITY, |span| span.0.as_secs_f64());
        let only_relative = self.config.p95.is_none() && self.config.max_increase.is_some();
        let interval = self.config.interval.map_or(INTERVAL, |span| span.0);
        let mut quiet = Window::new(QUIET);
        let mut measured: Option<Instant> = None;
        let mut looked: Option<Instant> = None;
        while !self.pace.is_stopped() {
            if cx.cancelled().is_cancelled() {
                return Err(cancelled().into());
            }
            if looked.is_none_or(|at| at.elapsed() > LOOK) {
                looked = Some(Instant::now());
                let pressure = self.others(session, own).await?;
                let nobody = only_relative && !others_at_work(session, own).await?;
                // Without a probe this is all there is to go by; and where nobody is there to be held up,
                // what the backfill costs is measured when they come.
                if pressure > 1.0 || self.config.probe.is_none() || nobody {
                    self.pace.observe(pressure);
                }
                if nobody {
                    tokio::time::sleep(LOOK).await;
                    continue;
                }
            }
            let Some(probe) = &self.config.probe else {
                tokio::time::sleep(LOOK).await;
                continue;
            };
            let mut limit = stated;
            if let Some(share) = self.config.max_increase {
                if measured.is_none_or(|at| at.elapsed() > BASELINE_AGAIN) {
                    self.baseline(session, probe, interval, &mut quiet).await?;
                    measured = Some(Instant::now());
                }
                limit = limit.min(quiet.p95().map_or(f64::INFINITY, |base| base * (1.0 + share.0)));
            }
            let before = self.pace.running.load(Ordering::SeqCst);
            let sample = probed(session, probe).await?;
            self.pace.sample(sample > limit);
            // What is measured between two batches keeps the comparison up to date.
            if before == 0 && self.pace.running.load(Ordering::SeqCst) == 0 {
                quiet.push(sample);
            }
            tokio::time::sleep(interval).await;
        }
        Ok(())
    }

    /// Measures the probe while no batch runs.
    async fn baseline(
        &self,
        session: &mut Session,
        probe: &str,
        interval: Duration,
        quiet: &mut Window,
    ) -> Result<(), PostgresError> {
        self.pace.set_paused(true);
        while self.pace.running.load(Ordering::SeqCst) > 0 && !self.pace.is_stopped() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let began = Instant::now();
        let mut done = Ok(());
        while began.elapsed() < BASELINE && !self.pace.is_stopped() && done.is_ok() {
            done = probed(session, probe).await.map(|sample| quiet.push(sample));
            tokio::time::sleep(interval).await;
        }
        self.pace.set_paused(false);
        done
    }

    /// Measures what is not the probe; each divided by its limit.
    async fn others(&self, session: &mut Session, own: &str) -> Result<f64, PostgresError> {
        let mut pressure: f64 = 0.0;
        if let Some(most) = self.config.replication_lag {
            let lag: f64 = sqlx::query_scalar(
                "select coalesce(max(case when replay_lsn >= sent_lsn and sent_lsn >= pg_current_wal_lsn() then 0 \
                 else extract(epoch from replay_lag) end), 0)::float8 from pg_stat_replication",
            )
            .fetch_one(session.connection())
            .await
            .doing(|| "measuring the replication lag".into())?;
            pressure = pressure.max(lag / most.0.as_secs_f64().max(1e-3));
        }
        if let Some(most) = self.config.lock_waits {
            let waiting: i64 = sqlx::query_scalar(
                "select count(*) from pg_stat_activity w where w.wait_event_type = 'Lock' and w.application_name <> $1 \
                 and pg_blocking_pids(w.pid) && array(select pid from pg_stat_activity where application_name = $1)",
            )
            .bind(own)
            .fetch_one(session.connection())
            .await
            .doing(|| "looking who waits for locks".into())?;
            let gave_way = f64::from(self.pace.gave_way.swap(0, Ordering::SeqCst));
            let most = f64::from(most);
            pressure = pressure.max((waiting as f64).max(gave_way / 4.0) / most.max(0.5));
        }
        Ok(pressure)
    }
}

async fn probed(session: &mut Session, probe: &str) -> Result<f64, PostgresError> {
    let began = Instant::now();
    sqlx::query(built(probe)).fetch_all(session.connection()).await.doing(|| "the probe of the budget".into())?;
    Ok(began.elapsed().as_secs_f64())
}

/// Tells whether any client but the backfill was at work lately; one whose state this user may not
/// see counts.
async fn others_at_work(session: &mut Session, own: &str) -> Result<bool, PostgresError> {
    sqlx::query_scalar(
        "select exists (select from pg_stat_activity where backend_type = 'client backend' and application_name <> $1 \
         and application_name <> 'upgrade' and pid <> pg_backend_pid() \
         and coalesce(state = 'active' or state_change > clock_timestamp() - interval '2 s', true))",
    )
    .bind(own)
    .fetch_one(session.connection())
    .await
    .doing(|| "looking whether anybody is at work".into())
}

/// Tells whether an operator asked for a pause: an item `pause` of the step in the ledger.
pub(crate) async fn pause_asked(session: &mut Session, ledger: &Ledger) -> Result<bool, PostgresError> {
    Ok(ledger.get::<serde_json::Value>(session.connection(), "pause").await?.is_some())
}
