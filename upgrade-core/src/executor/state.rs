//! What a run's journal says: the state that every decision is made from.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use serde_json::Value;

use super::drive::outcome_of;
use super::{ExecutorError, Outcome};
use crate::context::{Baseline, Direction};
use crate::entry::{
    Cause, Definition, Demand, ENTRY_FORMAT, Entry, GuardAction, Header, Health, Phase, Record, Request, Resolution,
    Versioned,
};
use crate::error::StepError;
use crate::names::{CheckId, LockName, RunId, Seq, StepId};
use crate::step::Change;
use crate::transition::{RunState, StepState};
use crate::verdict::{Status, Verdict};

/// Holds what a journal says of a run, entry by entry.
#[derive(Debug, Clone)]
pub struct Run {
    header: Header,
    definition: Definition,
    pub(crate) state: RunState,
    pub(crate) cause: Option<Cause>,
    pub(crate) held_from: Option<RunState>,
    pub(crate) deadline: Option<Timestamp>,
    pub(crate) health: Option<Health>,
    pub(crate) steps: BTreeMap<StepId, StepRun>,
    pub(crate) checks: BTreeMap<(Phase, CheckId), Verdict>,
    pub(crate) baselines: BTreeMap<CheckId, Baseline>,
    pub(crate) targets: BTreeMap<LockName, String>,
    /// The outputs of the steps, shared with every call: copied only where one still holds them.
    outputs: Arc<BTreeMap<StepId, Value>>,
    /// The first thing that makes the run turn back.
    pub(crate) failure: Option<Cause>,
    /// The first thing that makes the run wait.
    pub(crate) hold: Option<Cause>,
    pub(crate) confirmed: bool,
    /// Whether the verifications have passed since a driver last took the run up.
    pub(crate) verified: bool,
    pub(crate) alarmed: bool,
    requests: BTreeMap<String, Request>,
    answered: BTreeSet<String>,
    pub(crate) clock_started: Timestamp,
    pub(crate) rollback_started: Option<Timestamp>,
    created: Timestamp,
    updated: Timestamp,
    next: Seq,
}

/// Holds what a journal says of one step.
#[derive(Debug, Clone, Default)]
pub struct StepRun {
    pub(crate) state: StepStateOrPending,
    pub(crate) undo: Option<Versioned>,
    pub(crate) output: Option<Versioned>,
    pub(crate) changes: Vec<Change>,
    pub(crate) error: Option<StepError>,
    /// Calls in the present direction that failed since a driver took the run up.
    pub(crate) failures: u32,
    /// Calls in the present direction that ended or were cut off.
    pub(crate) tries: u32,
    /// Whether the last call was cut off by a crash.
    pub(crate) interrupted: bool,
    pub(crate) retry_at: Option<Timestamp>,
    pub(crate) checkpoints: BTreeMap<Direction, Versioned>,
    pub(crate) elapsed_ms: Option<u64>,
    pub(crate) undo_elapsed_ms: Option<u64>,
    pub(crate) reason: Option<String>,
}

/// Gives a step that no entry speaks of its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StepStateOrPending(pub(crate) StepState);

impl Default for StepStateOrPending {
    fn default() -> Self {
        Self(StepState::Pending)
    }
}

impl StepRun {
    /// Returns the step's state.
    pub fn state(&self) -> StepState {
        self.state.0
    }

    /// Returns what the last failed call said.
    pub fn error(&self) -> Option<&StepError> {
        self.error.as_ref()
    }

    /// Returns what the step changed, as its `prepare` said.
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }

    /// Returns how long `apply` took, in milliseconds.
    pub fn elapsed_ms(&self) -> Option<u64> {
        self.elapsed_ms
    }

    /// Returns how long `rollback` took, in milliseconds.
    pub fn undo_elapsed_ms(&self) -> Option<u64> {
        self.undo_elapsed_ms
    }

    /// Counts the calls in the present direction that ended or were cut off.
    pub fn tries(&self) -> u32 {
        self.tries
    }

    /// Returns what later steps see.
    pub fn output(&self) -> Option<&Value> {
        self.output.as_ref().map(|output| &output.value)
    }

    /// Returns why the step was unchanged or skipped.
    pub fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    fn turn(&mut self) {
        (self.failures, self.tries, self.interrupted, self.retry_at) = (0, 0, false, None);
    }
}

impl Run {
    /// Reads a run from its records.
    ///
    /// # Errors
    /// The records are not what a run can have written: [`ExecutorError::Corrupt`] with the line.
    pub fn replay<R: Borrow<Record>>(records: impl IntoIterator<Item = R>) -> Result<Self, ExecutorError> {
        let corrupt =
            |run: &str, line: u64, reason: String| ExecutorError::Corrupt { run: run.to_owned(), line, reason };
        let mut records = records.into_iter();
        let first = records.next().ok_or_else(|| corrupt("?", 1, "the journal is empty".into()))?;
        let first = first.borrow();
        let Entry::RunCreated(header) = &first.entry else {
            return Err(corrupt("?", 1, "the first entry does not create the run".into()));
        };
        if header.format > ENTRY_FORMAT {
            let reason = format!("its entries have format {}; this program reads up to {ENTRY_FORMAT}", header.format);
            return Err(corrupt(header.run.as_str(), 1, reason));
        }
        let mut run = Self::created(header, first.at);
        for record in records {
            let record = record.borrow();
            if record.seq != run.next {
                let reason = format!("it has number {} where {} was expected", record.seq, run.next);
                return Err(corrupt(header.run.as_str(), run.next + 1, reason));
            }
            run.apply(&record.entry, record.at)
                .map_err(|reason| corrupt(header.run.as_str(), record.seq + 1, reason))?;
        }
        Ok(run)
    }

    pub(crate) fn created(header: &Header, at: Timestamp) -> Self {
        Self {
            header: header.clone(),
            definition: header.definition.clone(),
            state: RunState::Checking,
            cause: None,
            held_from: None,
            deadline: None,
            health: None,
            steps: BTreeMap::new(),
            checks: BTreeMap::new(),
            baselines: BTreeMap::new(),
            targets: BTreeMap::new(),
            outputs: Arc::default(),
            failure: None,
            hold: None,
            confirmed: false,
            verified: false,
            alarmed: false,
            requests: BTreeMap::new(),
            answered: BTreeSet::new(),
            clock_started: at,
            rollback_started: None,
            created: at,
            updated: at,
            next: 1,
        }
    }

    /// Takes one entry in; the reason of a refusal says what a run could not have written.
    pub(crate) fn apply(&mut self, entry: &Entry, at: Timestamp) -> Result<(), String> {
        match entry {
            Entry::RunCreated(_) => return Err("the run is created twice".into()),
            Entry::DriverAttached { .. } => self.attach(),
            Entry::DefinitionAdopted { definition, .. } => self.definition = (**definition).clone(),
            Entry::TargetIdentified { target, identity } => {
                self.targets.insert(target.clone(), identity.clone());
            }
            Entry::RunEntered { state, cause, deadline, health } => {
                self.enter(*state, cause.as_ref(), *deadline, *health, at)?;
            }
            Entry::CheckReported { phase, check, verdict, .. } => self.report(phase, check, verdict),
            Entry::GuardChanged { guard, breached, action, verdict } => {
                let cause = || Cause::Check { phase: Phase::Guard, check: guard.clone(), verdict: verdict.clone() };
                match action {
                    GuardAction::Rollback if *breached => self.failure = self.failure.take().or_else(|| Some(cause())),
                    GuardAction::Hold if *breached => self.hold = self.hold.take().or_else(|| Some(cause())),
                    _ => {}
                }
            }
            Entry::RequestReceived { request } => {
                self.requests.insert(request.id.clone(), request.clone());
            }
            Entry::RequestAnswered { id, refused } => {
                let request =
                    self.requests.remove(id).ok_or_else(|| format!("it answers a request `{id}` that was not made"))?;
                self.answered.insert(id.clone());
                if refused.is_none() {
                    self.grant(&request);
                }
            }
            Entry::BudgetAlarm { .. } => self.alarmed = true,
            step => self.apply_step(step)?,
        }
        self.updated = at;
        self.next += 1;
        Ok(())
    }

    fn attach(&mut self) {
        let checking = self.state == RunState::Checking;
        let pending: Vec<StepId> = self
            .checks
            .keys()
            .filter_map(|(phase, _)| match phase {
                Phase::Before(step) if self.step_state(step) == StepState::Pending => Some(step.clone()),
                _ => None,
            })
            .collect();
        // What was asked of the system as it was before the crash is asked again; what a step's
        // own check answered stands, since later steps may have changed it on purpose.
        self.checks.retain(|(phase, _), _| match phase {
            Phase::Pre | Phase::Baseline => !checking,
            Phase::Before(step) => !pending.contains(step),
            Phase::After(_) => true,
            Phase::Pivot | Phase::Guard | Phase::Verify | Phase::RollbackVerify => false,
        });
        self.verified = false;
        for step in self.steps.values_mut() {
            let cut_off = matches!(step.state.0, StepState::Prepared | StepState::Undoing)
                || (step.state.0 == StepState::Applied && self.state == RunState::Committing);
            if cut_off {
                step.interrupted = true;
                step.tries += 1;
            }
            step.failures = 0;
            step.retry_at = None;
        }
    }

    fn enter(
        &mut self,
        state: RunState,
        cause: Option<&Cause>,
        deadline: Option<Timestamp>,
        health: Option<Health>,
        at: Timestamp,
    ) -> Result<(), String> {
        if !self.state.may_become(state) {
            return Err(format!("a run that is {} cannot become {state}", self.state));
        }
        if let Some(Cause::Unresponsive { step, .. }) = cause {
            // Whatever is called next on it must first end what the call left running.
            let step = self.step_mut(step);
            step.interrupted = true;
            step.tries += 1;
        }
        match (self.state, state) {
            (from, RunState::Held) => self.held_from = Some(from),
            (RunState::Held, _) => {
                self.held_from = None;
                // A call that did not return kept the run from turning back: what asked for that
                // still stands.
                if !matches!(self.cause, Some(Cause::Unresponsive { .. })) {
                    self.failure = None;
                }
                self.clock_started = at;
                self.checks.retain(|_, verdict| matches!(verdict.status, Status::Pass | Status::Warn));
            }
            _ => {}
        }
        match state {
            RunState::RollingBack => {
                self.rollback_started.get_or_insert(at);
                self.failure = None;
                // Those that failed to be undone wait for their resolution; the others turn here.
                self.steps.values_mut().filter(|s| s.state.0 != StepState::Undoing).for_each(StepRun::turn);
            }
            RunState::Probation => {
                self.verified |= self.state == RunState::Verifying;
                self.deadline = deadline;
            }
            RunState::Committing => self.steps.values_mut().for_each(StepRun::turn),
            _ => {}
        }
        self.hold = None;
        self.health = health.or(self.health);
        if cause.is_some() || state != RunState::RolledBack {
            self.cause = cause.cloned().or_else(|| self.cause.take().filter(|_| keeps_cause(state)));
        }
        self.state = state;
        Ok(())
    }

    fn report(&mut self, phase: &Phase, check: &CheckId, verdict: &Verdict) {
        self.checks.insert((phase.clone(), check.clone()), verdict.clone());
        if matches!(phase, Phase::Pre | Phase::Baseline) {
            let baseline = self.baselines.entry(check.clone()).or_default();
            baseline.figures.extend(verdict.measurements.clone());
            baseline.facts.extend(verdict.facts.clone());
        }
        let cause = || Cause::Check { phase: phase.clone(), check: check.clone(), verdict: verdict.clone() };
        match (phase, verdict.status) {
            (Phase::RollbackVerify | Phase::Baseline, _) | (_, Status::Pass | Status::Warn) => {}
            // Before anything is changed there is nothing to hold: unknown rejects, as a failure does.
            (Phase::Pre, _) | (_, Status::Fail) => self.failure = self.failure.take().or_else(|| Some(cause())),
            (_, Status::Unknown) => self.hold = self.hold.take().or_else(|| Some(cause())),
        }
    }

    fn grant(&mut self, request: &Request) {
        let cause = |reason: &String| Cause::Operator { actor: request.actor.clone(), reason: reason.clone() };
        match &request.demand {
            Demand::Stop { reason } => self.hold = Some(cause(reason)),
            // A run that is rolling back does what is asked already, unless it was about to stop.
            Demand::Rollback { .. } if self.state == RunState::RollingBack => self.hold = None,
            Demand::Rollback { reason } => self.failure = Some(cause(reason)),
            Demand::Confirm { .. } => self.confirmed = true,
            Demand::Resume => self.hold = None,
            Demand::Resolve { .. } => {}
        }
    }

    fn apply_step(&mut self, entry: &Entry) -> Result<(), String> {
        match entry {
            Entry::StepPrepared { step, undo, changes } => {
                let run = self.become_state(step, StepState::Prepared)?;
                run.undo = Some(undo.clone());
                run.changes.clone_from(changes);
                run.turn();
            }
            Entry::StepUnchanged { step, output, reason } => {
                self.checks.retain(|(phase, _), _| *phase != Phase::Pivot);
                let run = self.become_state(step, StepState::Unchanged)?;
                run.output = Some(output.clone());
                run.reason = Some(reason.clone());
                Arc::make_mut(&mut self.outputs).insert(step.clone(), output.value.clone());
            }
            Entry::StepSkipped { step, reason } => {
                self.checks.retain(|(phase, _), _| *phase != Phase::Pivot);
                self.become_state(step, StepState::Skipped)?.reason = Some(reason.clone());
            }
            Entry::StepCheckpoint { step, direction, checkpoint } => {
                self.step_mut(step).checkpoints.insert(*direction, checkpoint.clone());
            }
            Entry::StepFailed { step, direction, error, retry_at, .. } => {
                self.fail(step, *direction, error, *retry_at)?;
            }
            Entry::StepApplied { step, output, elapsed_ms } => {
                let run = self.become_state(step, StepState::Applied)?;
                run.output = Some(output.clone());
                run.elapsed_ms = Some(*elapsed_ms);
                run.error = None;
                run.turn();
                Arc::make_mut(&mut self.outputs).insert(step.clone(), output.value.clone());
            }
            Entry::StepUndoing { step } => self.become_state(step, StepState::Undoing)?.turn(),
            Entry::StepUndone { step, elapsed_ms } => {
                let run = self.become_state(step, StepState::Undone)?;
                run.undo_elapsed_ms = Some(*elapsed_ms);
                run.error = None;
            }
            Entry::StepResolved { step, resolution, .. } => {
                let state = match resolution {
                    Resolution::Retry => StepState::Undoing,
                    Resolution::Skip => StepState::Undone,
                    Resolution::Abandon => StepState::Abandoned,
                };
                let run = self.become_state(step, state)?;
                run.failures = 0;
                run.retry_at = None;
            }
            Entry::StepCommitted { step } => self.become_state(step, StepState::Committed)?.turn(),
            other => return Err(format!("it is not known: {other:?}")),
        }
        Ok(())
    }

    fn fail(
        &mut self,
        step: &StepId,
        direction: Direction,
        error: &StepError,
        retry_at: Option<Timestamp>,
    ) -> Result<(), String> {
        let run = self.step_mut(step);
        run.error = Some(error.clone());
        run.failures += 1;
        run.tries += 1;
        run.interrupted = false;
        run.retry_at = retry_at;
        if retry_at.is_some() {
            return Ok(());
        }
        let cause = Cause::Step { step: step.clone(), error: error.clone() };
        match direction {
            Direction::Forward => self.failure = self.failure.take().or(Some(cause)),
            Direction::Back => {
                self.become_state(step, StepState::UndoFailed)?;
            }
            Direction::Commit => self.hold = self.hold.take().or(Some(cause)),
        }
        Ok(())
    }

    fn become_state(&mut self, step: &StepId, next: StepState) -> Result<&mut StepRun, String> {
        let run = self.steps.entry(step.clone()).or_default();
        if !run.state.0.may_become(next) {
            return Err(format!("step `{step}` is {} and cannot become {next}", run.state.0));
        }
        run.state = StepStateOrPending(next);
        Ok(run)
    }

    fn step_mut(&mut self, step: &StepId) -> &mut StepRun {
        self.steps.entry(step.clone()).or_default()
    }

    /// Returns the run's name.
    pub fn id(&self) -> &RunId {
        &self.header.run
    }

    /// Returns the first entry's description of the run.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Returns what the run is bound to: the last definition adopted.
    pub fn definition(&self) -> &Definition {
        &self.definition
    }

    /// Returns the state of the run.
    pub fn state(&self) -> RunState {
        self.state
    }

    /// Says how the run ended, or why it waits if nobody drives it: for whoever follows it from
    /// outside.
    pub fn outcome(&self) -> Outcome {
        outcome_of(self)
    }

    /// Returns the state that a held run goes on in.
    pub fn held_from(&self) -> Option<RunState> {
        self.held_from
    }

    /// Returns why the run left its way, if it did.
    pub fn cause(&self) -> Option<&Cause> {
        self.cause.as_ref()
    }

    /// Returns when the probation ends, if it ends by itself.
    pub fn deadline(&self) -> Option<Timestamp> {
        self.deadline
    }

    /// Returns whether the system was well after the rollback.
    pub fn health(&self) -> Option<Health> {
        self.health
    }

    /// Tells whether a request was answered: one that a crash left behind is not taken up again.
    pub(crate) fn has_answered(&self, request: &str) -> bool {
        self.answered.contains(request)
    }

    /// Lists the steps that an entry speaks of.
    pub fn steps(&self) -> &BTreeMap<StepId, StepRun> {
        &self.steps
    }

    /// Returns the state of a step; *pending* if no entry speaks of it.
    pub fn step_state(&self, step: &StepId) -> StepState {
        self.steps.get(step).map_or(StepState::Pending, StepRun::state)
    }

    /// Lists the last answer of each check, by phase.
    pub fn checks(&self) -> &BTreeMap<(Phase, CheckId), Verdict> {
        &self.checks
    }

    /// Returns when the run was created.
    pub fn created_at(&self) -> Timestamp {
        self.created
    }

    /// Returns when the last entry was written.
    pub fn updated_at(&self) -> Timestamp {
        self.updated
    }

    /// Counts the entries.
    pub fn entries(&self) -> Seq {
        self.next
    }

    /// Lists the steps whose undo failed.
    pub fn stuck_steps(&self) -> Vec<(StepId, Option<StepError>)> {
        self.in_state(StepState::UndoFailed).map(|(id, step)| (id.clone(), step.error.clone())).collect()
    }

    pub(crate) fn in_state(&self, state: StepState) -> impl Iterator<Item = (&StepId, &StepRun)> {
        self.steps.iter().filter(move |(_, step)| step.state.0 == state)
    }

    pub(crate) fn outputs(&self) -> &Arc<BTreeMap<StepId, Value>> {
        &self.outputs
    }
}

/// Tells whether a state goes on with the cause of the one before.
fn keeps_cause(state: RunState) -> bool {
    matches!(state, RunState::RollingBack | RunState::RolledBack | RunState::Stuck | RunState::Abandoned)
}
