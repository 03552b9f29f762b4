//! Defects seeded on purpose: a sweep that does not notice one of them proves nothing.

use crate::executor::decide::{Action, Call, Circumstances, Decision, decide};
use crate::executor::state::{Run, StepStateOrPending};
use crate::pipeline::Pipeline;
use crate::transition::{RunState, StepState};

/// Lists the defects that a sweep must notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// The step that failed, or was cut off, is not undone.
    SkipFailedUndo,
    /// Steps are undone in the order in which they were applied.
    ForwardUnwind,
    /// A failure is taken for a success.
    SwallowFailure,
    /// The undo record does not reach the journal.
    DropUndoRecord,
}

impl Mutation {
    /// Lists every mutation.
    pub const ALL: [Self; 4] = [Self::SkipFailedUndo, Self::ForwardUnwind, Self::SwallowFailure, Self::DropUndoRecord];

    pub(crate) fn decide(self) -> fn(&Pipeline, &Run, &Circumstances<'_>) -> Decision {
        match self {
            Self::SkipFailedUndo => skip_failed_undo,
            Self::ForwardUnwind => forward_unwind,
            Self::SwallowFailure => swallow_failure,
            Self::DropUndoRecord => decide,
        }
    }
}

fn skip_failed_undo(pipeline: &Pipeline, run: &Run, around: &Circumstances<'_>) -> Decision {
    let mut run = run.clone();
    if run.state == RunState::RollingBack {
        for step in run.steps.values_mut().filter(|step| step.state() == StepState::Prepared) {
            step.state = StepStateOrPending(StepState::Undone);
        }
    }
    decide(pipeline, &run, around)
}

fn forward_unwind(pipeline: &Pipeline, run: &Run, around: &Circumstances<'_>) -> Decision {
    let open = |state| matches!(state, StepState::Prepared | StepState::Applied | StepState::Undoing);
    let first = pipeline.graph.order().iter().find(|id| open(run.step_state(id)));
    let (RunState::RollingBack, Some(id)) = (run.state, first) else { return decide(pipeline, run, around) };
    let call = Call::Undo(id.clone());
    let actions = match run.step_state(id) {
        StepState::Undoing if around.in_flight.contains(&call) => Vec::new(),
        StepState::Undoing => vec![Action::Call(call)],
        _ => vec![Action::BeginUndo(id.clone())],
    };
    Decision { actions, ..Decision::default() }
}

fn swallow_failure(pipeline: &Pipeline, run: &Run, around: &Circumstances<'_>) -> Decision {
    let mut run = run.clone();
    run.failure = None;
    decide(pipeline, &run, around)
}
