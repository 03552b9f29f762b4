//! What must hold between the entries of any run, whatever happened to it.

use std::collections::BTreeMap;

use crate::entry::{Entry, Record, Resolution};
use crate::executor::state::Run;
use crate::graph::Graph;
use crate::names::StepId;
use crate::transition::{RunState, StepState};

/// Lists what is wrong with the order of a run's entries; nothing for a run that kept it.
///
/// - a step is prepared only when all that it needs is done;
/// - a step is undone only when all that needs it, directly or through others, is back;
/// - nothing is begun once the run turned back, and nothing undone before;
/// - a run that is rolled back left no step prepared or applied.
pub fn order_violations(graph: &Graph, records: &[Record]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut states: BTreeMap<&StepId, StepState> = BTreeMap::new();
    let mut state = RunState::Checking;
    for record in records {
        let of = |states: &BTreeMap<&StepId, StepState>, step: &StepId| {
            states.get(step).copied().unwrap_or(StepState::Pending)
        };
        match &record.entry {
            Entry::RunEntered { state: next, .. } => {
                state = *next;
                let open = |s: &&StepState| matches!(s, StepState::Prepared | StepState::Applied | StepState::Undoing);
                if state == RunState::RolledBack && states.values().any(|s| open(&s)) {
                    wrong.push(format!("entry {}: rolled back with steps that were not undone", record.seq));
                }
            }
            Entry::StepPrepared { step, .. } => {
                if state != RunState::Applying {
                    wrong.push(format!("entry {}: `{step}` is prepared while the run is {state}", record.seq));
                }
                for needs in graph.needs(step).filter(|needs| !of(&states, needs).lets_dependents_start()) {
                    wrong.push(format!("entry {}: `{step}` is prepared before `{needs}` is done", record.seq));
                }
            }
            Entry::StepUndoing { step } => {
                if state != RunState::RollingBack {
                    wrong.push(format!("entry {}: `{step}` is undone while the run is {state}", record.seq));
                }
                for later in graph.all_needed_by(step).iter().filter(|later| !of(&states, later).is_back()) {
                    wrong.push(format!("entry {}: `{step}` is undone before `{later}`, which needs it", record.seq));
                }
            }
            _ => {}
        }
        match &record.entry {
            Entry::StepPrepared { step, .. } => states.insert(step, StepState::Prepared),
            Entry::StepUnchanged { step, .. } => states.insert(step, StepState::Unchanged),
            Entry::StepSkipped { step, .. } => states.insert(step, StepState::Skipped),
            Entry::StepApplied { step, .. } => states.insert(step, StepState::Applied),
            Entry::StepUndoing { step } => states.insert(step, StepState::Undoing),
            Entry::StepUndone { step, .. } => states.insert(step, StepState::Undone),
            Entry::StepCommitted { step } => states.insert(step, StepState::Committed),
            Entry::StepResolved { step, resolution, .. } => states.insert(
                step,
                match resolution {
                    Resolution::Retry => StepState::Undoing,
                    Resolution::Skip => StepState::Undone,
                    Resolution::Abandon => StepState::Abandoned,
                },
            ),
            _ => None,
        };
    }
    if let Err(error) = Run::replay(records) {
        wrong.push(error.to_string());
    }
    wrong
}
