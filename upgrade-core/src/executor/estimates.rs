//! How long steps took in earlier runs.

use std::collections::BTreeMap;

use super::state::Run;
use super::{Executor, ExecutorError};
use crate::names::StepId;
use crate::pipeline::Pipeline;
use crate::transition::RunState;

/// From how many earlier runs an estimate is made.
const RUNS: usize = 5;

/// Holds the median durations of steps in earlier runs, in milliseconds.
#[derive(Debug, Clone, Default)]
pub(crate) struct Estimates {
    pub(crate) apply_ms: BTreeMap<StepId, u64>,
    pub(crate) undo_ms: BTreeMap<StepId, u64>,
}

impl Executor {
    /// Reads how long the steps of a pipeline took when it, or one of its name, ran before.
    pub(crate) async fn estimates(&self, pipeline: &Pipeline) -> Result<Estimates, ExecutorError> {
        let (mut apply, mut undo): (BTreeMap<_, Vec<u64>>, BTreeMap<_, Vec<u64>>) = Default::default();
        let runs = self.journal.runs().await?;
        let over = |state| matches!(state, RunState::Committed | RunState::RolledBack);
        let earlier = runs.iter().rev().filter(|run| {
            run.damage.is_none() && run.pipeline.as_ref() == Some(&pipeline.name) && run.state.is_some_and(over)
        });
        for summary in earlier.take(RUNS) {
            // An estimate is a courtesy: a run that cannot be read must not stand in the way of one.
            let Ok(run) = self.journal.load(&summary.run).await.map_err(ExecutorError::from).and_then(Run::replay)
            else {
                tracing::debug!(run = %summary.run, "an earlier run cannot be read; it gives no estimate");
                continue;
            };
            for (id, step) in run.steps() {
                apply.entry(id.clone()).or_default().extend(step.elapsed_ms());
                undo.entry(id.clone()).or_default().extend(step.undo_elapsed_ms());
            }
        }
        Ok(Estimates { apply_ms: medians(apply), undo_ms: medians(undo) })
    }
}

fn medians(durations: BTreeMap<StepId, Vec<u64>>) -> BTreeMap<StepId, u64> {
    let median = |mut times: Vec<u64>| {
        times.sort_unstable();
        times.get(times.len() / 2).copied()
    };
    durations.into_iter().filter_map(|(id, times)| Some((id, median(times)?))).collect()
}
