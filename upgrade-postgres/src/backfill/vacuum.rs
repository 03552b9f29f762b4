//! Vacuum beside the walk: the space of the rows that were replaced takes the rows to come.
//!
//! Each one looks at the pages that changed since the one before, and at the indexes once.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use super::pace::Pace;
use crate::error::Doing;
use crate::identifier::TableName;
use crate::target::Database;

/// Says when the table is vacuumed: after so many dead rows.
#[derive(Debug, Clone)]
pub(crate) struct Cadence {
    pub(crate) table: TableName,
    pub(crate) every: u64,
    /// Whether it makes room for others, as there is a budget.
    pub(crate) gentle: bool,
}

impl Cadence {
    /// Chooses after how many rows: a share of the table, but not for every few.
    pub(crate) fn of(table: &TableName, share: f64, rows: Option<u64>, gentle: bool) -> Option<Self> {
        let every = (share * rows.unwrap_or(1_000_000) as f64) as u64;
        (share > 0.0).then(|| Self { table: table.clone(), every: every.max(10_000), gentle })
    }

    pub(crate) fn is_due(&self, pace: &Pace) -> bool {
        pace.dead.load(Ordering::SeqCst) >= self.every
    }

    /// Vacuums; one that somebody else is at already is left to them.
    pub(crate) async fn run(&self, cx: &Context, database: &Arc<Database>, pace: &Pace) -> Result<(), StepError> {
        pace.vacuum_begins(self.every);
        let done = self.vacuum(cx, database).await;
        pace.vacuum_ended();
        done
    }

    async fn vacuum(&self, cx: &Context, database: &Arc<Database>) -> Result<(), StepError> {
        let mut session = database.connect(cx).await?;
        if self.gentle {
            session.execute(cx, "set vacuum_cost_delay = '2ms'".into()).await?;
        }
        let sql = format!("vacuum (skip_locked, truncate off) {}", self.table);
        let done = session.execute(cx, sql).await.doing(|| format!("vacuuming {}", self.table));
        session.close().await;
        done?;
        Ok(())
    }
}
