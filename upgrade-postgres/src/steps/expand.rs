//! `postgres.expand`: changes one column in two shapes that stay in step until commit.

use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::AnyStep;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;

use crate::error::{PostgresError, not_cancelled};
use crate::expand::{self, Answer, Expansion, Phase, Surveyed, Wanted};
pub use crate::expand::{AddColumn, ExpandConfig, NotNullColumn, RenameColumn, RetypeColumn};
use crate::ledger::Ledger;
use crate::target::Database;

/// How many pages are filled in one transaction: half a megabyte, some thousand rows.
const BATCH: u32 = 64;

/// Adds, renames or retypes a column, or forbids NULL in it, without holding up traffic.
///
/// # Guarantees
/// From the end of `apply` until `commit` or the end of `rollback`, what is written through one
/// shape is seen through the other in the same transaction. `rollback` loses no write, `commit`
/// neither; both, and everything before, hold the table's strong lock only for moments.
#[derive(Debug, Clone)]
pub struct Expand {
    config: ExpandConfig,
    wanted: Wanted,
    database: Arc<Database>,
}

/// Holds what undoing and contracting need, whatever the pipeline says by then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpandUndo {
    /// Digest of the column and all that depends on it.
    found: String,
    expansion: Expansion,
}

/// Tells where the new shape is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpandOutput {
    /// The new shape's column, under its name in the view or, without one, in the table.
    pub column: String,
    /// The schema that new code puts first in its `search_path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<String>,
    /// How many rows were filled.
    pub rows: u64,
}

impl Expand {
    /// Makes the step from its configuration.
    ///
    /// # Errors
    /// The target is not a database, or the change contradicts itself.
    pub fn from_config(config: ExpandConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let database = cx.target::<Database>(&config.target)?;
        let wanted = config.change()?;
        Ok(Self { config, wanted, database })
    }

    /// Makes the step as a pipeline file names it.
    ///
    /// # Errors
    /// As [`Expand::from_config`].
    pub fn any_from_config(config: ExpandConfig, cx: &BuildContext) -> Result<AnyStep, BuildError> {
        Ok(AnyStep::reversible(Self::from_config(config, cx)?))
    }

    fn output(&self, rows: u64) -> ExpandOutput {
        ExpandOutput {
            column: self.wanted.name_after().as_str().to_owned(),
            schema: self.config.schema.as_ref().map(|schema| schema.as_str().to_owned()),
            rows,
        }
    }

    fn changes(&self, surveyed: &Surveyed) -> Vec<Change> {
        let expansion = &surveyed.expansion;
        let name = |column: &crate::identifier::Identifier| format!("{}.{}", expansion.table, column);
        let not_null = if expansion.not_null { " not null" } else { "" };
        let added = Change::new(Effect::Create, name(&expansion.name_after));
        let mut changes = Vec::new();
        match &expansion.old {
            None => changes.push(
                added
                    .with_summary(format!("{}{not_null}", expansion.type_name))
                    .undo_loses("what was written to the new column"),
            ),
            Some(old) => {
                changes.push(added.with_summary(format!(
                    "{}{not_null}; kept in step with {old} by triggers until commit",
                    expansion.type_name
                )));
                changes.push(Change::new(Effect::Remove, name(old)).with_summary("its old shape, at commit"));
            }
        }
        if let Some(view) = expansion.view() {
            changes.push(Change::new(Effect::Create, view.to_string()).with_summary(format!(
                "a view of the new shape until commit, for code whose search_path begins with {}",
                expansion.schema.as_ref().map(ToString::to_string).unwrap_or_default()
            )));
        }
        for copied in &surveyed.copied {
            changes.push(Change::new(Effect::Create, copied.clone()).with_summary("again, for the new shape"));
        }
        if expansion.pending.is_some() {
            changes.push(
                Change::new(Effect::Modify, expansion.table.to_string())
                    .with_summary(format!("about {} rows, filled in batches", surveyed.rows)),
            );
        }
        changes
    }
}

#[async_trait]
impl Step for Expand {
    const KIND: &'static str = "postgres.expand";
    type Undo = ExpandUndo;
    type Output = ExpandOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<ExpandUndo, ExpandOutput>, StepError> {
        let mut session = self.database.connect(cx).await?;
        session.require_writable()?;
        let (table, schema) = (&self.config.table, self.config.schema.as_ref());
        let (state, mark) = (self.database.state_schema(), cx.marker());
        let canceller = session.canceller();
        let surveying = expand::survey(session.connection(), &self.wanted, table, schema, &state, &mark);
        let answer = canceller.cancels(cx, surveying).await;
        session.close().await;
        match answer {
            Ok(Answer::Unchanged(reason)) => Ok(Prepared::unchanged(self.output(0), reason)),
            // What it speaks of may be made by the steps that the plan has not run.
            Ok(Answer::Missing(error, expansion)) if cx.is_dry_run() => {
                let change = Change::new(Effect::Modify, table.to_string())
                    .with_summary(format!("{error} yet; it is looked at when the step runs"));
                Ok(Prepared::change(ExpandUndo { found: String::new(), expansion: *expansion }, [change]))
            }
            Ok(Answer::Missing(error, _)) => Err(error),
            Ok(Answer::Change(surveyed)) => {
                let changes = self.changes(&surveyed);
                let Surveyed { expansion, found, .. } = *surveyed;
                Ok(Prepared::change(ExpandUndo { found, expansion }, changes))
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn apply(&self, cx: &Context, undo: &ExpandUndo) -> Result<ExpandOutput, StepError> {
        let mut session = self.database.connect(cx).await?;
        session.require_writable()?;
        let ledger = Ledger::of(&self.database, cx);
        ledger.ensure(&mut session).await?;
        let (policy, expansion) = (self.database.lock_policy(), &undo.expansion);
        let rows = loop {
            not_cancelled(cx)?;
            let (record, rows) = expand::progress(session.connection(), &ledger).await?;
            let session = &mut session;
            let Some(record) = record else {
                expand::expand(cx, session, &policy, &ledger, expansion, &undo.found).await?;
                continue;
            };
            match record.phase {
                Phase::Expanded => {
                    let pages = self.config.batch.unwrap_or(BATCH);
                    expand::fill(cx, session, &policy, &ledger, expansion, &record, pages).await?;
                }
                Phase::Filled => {
                    expand::index(cx, session, &policy, &ledger, expansion, &record).await.map_err(not_unique)?;
                }
                Phase::Indexed => expand::validate(cx, session, &policy, &ledger, expansion, &record).await?,
                Phase::Valid => expand::finish(cx, session, &policy, &ledger, expansion, &record).await?,
                Phase::InStep | Phase::Contracted => break rows,
            }
        };
        session.close().await;
        Ok(self.output(rows))
    }

    async fn settle(&self, cx: &Context, _undo: &ExpandUndo) -> Result<(), StepError> {
        self.database.settle(cx).await
    }

    async fn commit(&self, cx: &Context, undo: &ExpandUndo) -> Result<(), StepError> {
        let mut session = self.database.connect(cx).await?;
        let ledger = Ledger::of(&self.database, cx);
        expand::contract(cx, &mut session, &self.database.lock_policy(), &ledger, &undo.expansion).await?;
        ledger.clear(&mut session, &[]).await?;
        session.close().await;
        Ok(())
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.database.clone()]
    }
}

#[async_trait]
impl Rollback for Expand {
    async fn rollback(&self, cx: &Context, undo: &ExpandUndo, _output: Option<&ExpandOutput>) -> Result<(), StepError> {
        let mut session = self.database.connect(cx).await?;
        session.require_writable()?;
        let ledger = Ledger::of(&self.database, cx);
        expand::withdraw(cx, &mut session, &self.database.lock_policy(), &ledger, &undo.expansion).await?;
        ledger.clear(&mut session, &[]).await?;
        session.close().await;
        Ok(())
    }
}

/// Says what it means that the new shape of a unique column is not unique.
fn not_unique(error: PostgresError) -> StepError {
    let twice = error.code() == Some("23505");
    let error = StepError::from(error);
    match twice {
        true => error.with_hint("`up` makes equal values of different ones: correct it; rolling back loses nothing"),
        false => error,
    }
}
