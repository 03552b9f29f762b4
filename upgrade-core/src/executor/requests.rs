//! What may be asked of a run in which state, and what follows.

use super::decide::is_past_pivot;
use super::state::Run;
use crate::entry::{Cause, Demand, Entry, Request, Resolution};
use crate::names::StepId;
use crate::pipeline::Pipeline;
use crate::transition::{RunState, StepState};

/// Says why a demand cannot be met; `None` if it can.
pub(crate) fn refusal(pipeline: &Pipeline, run: &Run, demand: &Demand) -> Option<String> {
    let state = run.state;
    if state.is_final() {
        return Some(format!("the run is {state}: there is nothing more to do"));
    }
    match demand {
        Demand::Stop { .. } => (state == RunState::Stuck).then(|| {
            "the run is stuck: decide about the steps whose undo failed with `upgrade resolve RUN STEP`".to_owned()
        }),
        Demand::Resume => (state == RunState::Stuck).then(|| {
            "the run is stuck: decide about the steps whose undo failed with `upgrade resolve RUN STEP`".to_owned()
        }),
        Demand::Rollback { .. } => {
            let committing = state == RunState::Committing || run.held_from == Some(RunState::Committing);
            if committing {
                Some("the run is past its commit: only forward is left".to_owned())
            } else if is_past_pivot(pipeline, run) {
                let pivot = pipeline.graph.pivot().map_or("?", StepId::as_str);
                Some(format!("the run is past its pivot `{pivot}`, which cannot be undone: only forward is left"))
            } else if state == RunState::Stuck {
                Some("the run is rolling back and stuck: decide about the steps whose undo failed with `upgrade resolve RUN STEP`".to_owned())
            } else {
                None
            }
        }
        Demand::Confirm { .. } => {
            // A probation that is taken up again is verified first: it has its deadline already.
            let probation = match run.held_from.unwrap_or(state) {
                RunState::Verifying => run.deadline.is_some(),
                state => state == RunState::Probation,
            };
            (!probation).then(|| format!("the run is {state}, not in probation: there is nothing to commit yet"))
        }
        Demand::Resolve { step, .. } => match run.step_state(step) {
            StepState::UndoFailed => None,
            StepState::Pending if !run.steps.contains_key(step) => {
                Some(format!("the run has no step `{step}` to resolve"))
            }
            state => Some(format!("step `{step}` is {state}: only a step whose undo failed can be resolved")),
        },
    }
}

/// Lists the entries that follow from a demand that is met.
pub(crate) fn consequences(pipeline: &Pipeline, run: &Run, request: &Request) -> Vec<Entry> {
    let enter = |state, cause| Entry::RunEntered { state, cause, deadline: run.deadline, health: None };
    match &request.demand {
        Demand::Stop { .. } => Vec::new(),
        Demand::Rollback { reason } if run.state == RunState::Held && run.held_from != Some(RunState::RollingBack) => {
            let cause = Cause::Operator { actor: request.actor.clone(), reason: reason.clone() };
            vec![enter(RunState::RollingBack, Some(cause))]
        }
        Demand::Resume | Demand::Confirm { .. } | Demand::Rollback { .. } => {
            run.held_from.map(|state| enter(state, None)).into_iter().collect()
        }
        Demand::Resolve { step, resolution, reason } => {
            let resolved = |step: &StepId, reason: String| Entry::StepResolved {
                step: step.clone(),
                resolution: *resolution,
                actor: request.actor.clone(),
                reason,
            };
            let mut entries = vec![resolved(step, reason.clone())];
            if *resolution == Resolution::Abandon {
                // What an abandoned step stands on cannot be taken from under it.
                let below = pipeline.graph.all_needs(step);
                let stays = |id: &&StepId| {
                    matches!(run.step_state(id), StepState::Prepared | StepState::Applied | StepState::UndoFailed)
                };
                entries.extend(
                    below
                        .iter()
                        .filter(stays)
                        .map(|id| resolved(id, format!("`{step}`, which needs it, was abandoned"))),
                );
            }
            if run.state == RunState::Stuck {
                entries.push(enter(RunState::RollingBack, None));
            }
            entries
        }
    }
}
