//! The dry run: what would change, what could be undone, how long it would take.

use std::collections::BTreeMap;

use jiff::Timestamp;
use semver::Version;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::admission::ENGINE;
use super::calls::{Caller, Ended};
use super::decide::Call;
use super::state::Run;
use super::{Executor, ExecutorError};
use crate::entry::{ENTRY_FORMAT, Entry, Header, Phase};
use crate::erased::AnyPrepared;
use crate::error::StepError;
use crate::names::{Actor, CheckId, PipelineName, RunId, StepId};
use crate::pipeline::{CommitMode, Pipeline};
use crate::step::Change;
use crate::verdict::Verdict;

/// Says what a run would do, as far as it can be known before it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// What would be upgraded.
    pub pipeline: PipelineName,
    /// The environment, if the pipeline names one.
    pub environment: Option<String>,
    /// The version found, if it is known.
    pub from: Option<Version>,
    /// The version that the pipeline leads to, if it names one.
    pub to: Option<Version>,
    /// Why a run would be refused, with what to do about it; absent if it would not.
    pub refused: Option<(String, Option<String>)>,
    /// The pre-checks, as they answer now.
    pub checks: Vec<PlannedCheck>,
    /// The steps, in order.
    pub steps: Vec<PlannedStep>,
    /// The first irreversible step.
    pub pivot: Option<StepId>,
    /// What data an undo would lose, by step.
    pub undo_loses: Vec<(StepId, String)>,
    /// How long the steps took in earlier runs, one after another, in milliseconds; absent where
    /// one of them never ran.
    pub estimate_ms: Option<u64>,
    /// When the upgrade would be committed.
    pub commit: CommitMode,
}

/// Says how a pre-check answers now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedCheck {
    /// The check.
    pub id: CheckId,
    /// Its answer.
    pub verdict: Verdict,
}

/// Says what a step would do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedStep {
    /// The step.
    pub id: StepId,
    /// Its kind.
    pub kind: String,
    /// What must be applied first.
    pub needs: Vec<StepId>,
    /// What it would do.
    pub effect: PlannedEffect,
    /// Why it cannot be undone; absent if it can.
    pub irreversible: Option<String>,
    /// How long it took in earlier runs, in milliseconds.
    pub estimate_ms: Option<u64>,
    /// How long its undo took in earlier runs, in milliseconds.
    pub undo_estimate_ms: Option<u64>,
}

/// Says what a step would do, as far as it is known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "effect", rename_all = "snake_case")]
pub enum PlannedEffect {
    /// It would change something.
    Change {
        /// What.
        changes: Vec<Change>,
    },
    /// It is done already.
    Unchanged {
        /// Why there is nothing to do.
        reason: String,
    },
    /// It would not run.
    Skipped {
        /// Why.
        reason: String,
    },
    /// It depends on a step that has not run.
    KnownAfter {
        /// That step.
        step: StepId,
    },
    /// It cannot be known: reading the present state failed.
    Failed {
        /// How.
        error: StepError,
        /// The step that has not run and may be why; absent if none is before it.
        after: Option<StepId>,
    },
}

impl Plan {
    /// Tells whether a run would change anything.
    pub fn has_changes(&self) -> bool {
        self.steps
            .iter()
            .any(|step| !matches!(step.effect, PlannedEffect::Unchanged { .. } | PlannedEffect::Skipped { .. }))
    }

    /// Tells whether a run could not succeed as things are.
    pub fn is_hopeless(&self) -> bool {
        let fails = |step: &PlannedStep| matches!(step.effect, PlannedEffect::Failed { after: None, .. });
        self.refused.is_some() || self.steps.iter().any(fails)
    }
}

impl Executor {
    /// Says what a run of `pipeline` would do; changes nothing, takes no lock.
    ///
    /// A step that cannot be read because an earlier one has not run is *known after* that one.
    ///
    /// # Errors
    /// The pipeline names a file that cannot be read, or the journal cannot be.
    pub async fn plan(&self, pipeline: &Pipeline) -> Result<Plan, ExecutorError> {
        let estimates = self.estimates(pipeline).await?;
        let (header, refused) = self.would_admit(pipeline).await?;
        let caller = self.reader(pipeline);
        let mut run = Run::created(&header, Timestamp::now());
        let mut checks = Vec::new();
        for node in &pipeline.checks {
            let call = Call::Check(Phase::Pre, node.id.clone());
            if let Ended::Checked(verdict) = ask(&caller, &call, &run).await? {
                checks.push(PlannedCheck { id: node.id.clone(), verdict });
            }
        }
        let mut effects: BTreeMap<StepId, PlannedEffect> = BTreeMap::new();
        let mut steps = Vec::new();
        for id in pipeline.graph.order() {
            let Some(node) = pipeline.step(id) else { continue };
            let effect = self.foresee(&caller, &mut run, pipeline, id, &effects).await?;
            effects.insert(id.clone(), effect.clone());
            steps.push(PlannedStep {
                id: id.clone(),
                kind: node.kind().to_owned(),
                needs: pipeline.graph.needs(id).cloned().collect(),
                effect,
                irreversible: node.irreversible_reason().map(str::to_owned),
                estimate_ms: estimates.apply_ms.get(id).copied(),
                undo_estimate_ms: estimates.undo_ms.get(id).copied(),
            });
        }
        let undo_loses = steps
            .iter()
            .filter_map(|step| match &step.effect {
                PlannedEffect::Change { changes } => Some(changes.iter().map(|change| (step.id.clone(), change))),
                _ => None,
            })
            .flatten()
            .filter_map(|(id, change)| Some((id, change.undo_loses.clone()?)))
            .collect();
        Ok(Plan {
            pipeline: pipeline.name.clone(),
            environment: pipeline.environment.clone(),
            from: header.from,
            to: pipeline.to.clone(),
            refused,
            checks,
            estimate_ms: steps.iter().map(|step| step.estimate_ms).sum(),
            pivot: pipeline.graph.pivot().cloned(),
            undo_loses,
            steps,
            commit: pipeline.commit,
        })
    }

    async fn would_admit(
        &self,
        pipeline: &Pipeline,
    ) -> Result<(Header, Option<(String, Option<String>)>), ExecutorError> {
        let mut header = Header {
            format: ENTRY_FORMAT,
            run: RunId::generate(),
            pipeline: pipeline.name.clone(),
            environment: pipeline.environment.clone(),
            from: None,
            to: pipeline.to.clone(),
            locks: Vec::new(),
            definition: pipeline.define().map_err(ExecutorError::Pipeline)?,
            actor: Actor::current(),
            engine: ENGINE.into(),
        };
        match self.would_refuse(pipeline, &mut header).await {
            Ok(()) => Ok((header, None)),
            Err(ExecutorError::Refused { message, hint }) => Ok((header, Some((message, hint)))),
            Err(error) => Err(error),
        }
    }

    async fn foresee(
        &self,
        caller: &Caller,
        run: &mut Run,
        pipeline: &Pipeline,
        id: &StepId,
        effects: &BTreeMap<StepId, PlannedEffect>,
    ) -> Result<PlannedEffect, ExecutorError> {
        let needed = pipeline.graph.all_needs(id);
        let settled =
            |effect: &PlannedEffect| matches!(effect, PlannedEffect::Unchanged { .. } | PlannedEffect::Skipped { .. });
        let after = pipeline
            .graph
            .order()
            .iter()
            .rev()
            .find(|other| needed.contains(*other) && effects.get(*other).is_some_and(|effect| !settled(effect)));
        let ended = match caller.call(&Call::Prepare(id.clone()), run, &CancellationToken::new(), None) {
            Ok(call) => call.await,
            Err(error) => Ended::Prepared(Err(error)),
        };
        Ok(match ended {
            Ended::Skipped(reason) => PlannedEffect::Skipped { reason },
            Ended::Prepared(Ok(AnyPrepared::Change { changes, .. })) => PlannedEffect::Change { changes },
            Ended::Prepared(Ok(AnyPrepared::KnownAfter { step })) => PlannedEffect::KnownAfter { step },
            Ended::Prepared(Ok(AnyPrepared::Unchanged { output, reason })) => {
                let entry = Entry::StepUnchanged { step: id.clone(), output, reason: reason.clone() };
                // The outputs of what is done already are known to the steps that follow.
                if let Err(reason) = run.apply(&entry, Timestamp::now()) {
                    tracing::debug!(%reason, "a planned step could not be noted");
                }
                PlannedEffect::Unchanged { reason }
            }
            Ended::Prepared(Err(error)) => {
                let error = error.map_text(|text| caller.secrets.mask(text));
                PlannedEffect::Failed { error, after: after.cloned() }
            }
            _ => PlannedEffect::Failed { error: StepError::unknown("it did not answer"), after: after.cloned() },
        })
    }
}

async fn ask(caller: &Caller, call: &Call, run: &Run) -> Result<Ended, ExecutorError> {
    let work = caller.call(call, run, &CancellationToken::new(), None).map_err(ExecutorError::Pipeline)?;
    Ok(work.await)
}
