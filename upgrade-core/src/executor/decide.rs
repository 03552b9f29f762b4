//! What to do next, from nothing but the pipeline and what the journal says.
//!
//! One pure function drives a run that starts, one that goes on after a crash, and one that turns
//! back: there is no other code that knows the order of things.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;

use super::state::Run;
use crate::entry::{Cause, GuardAction, Health, Phase};
use crate::names::{CheckId, StepId};
use crate::pipeline::{CheckNode, CommitMode, GuardNode, Pipeline, StepNode, StepPolicy};
use crate::transition::{RunState, StepState};
use crate::verdict::Status;

/// Names a call on the world; at most one of each is under way.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Call {
    /// Asks a check.
    Check(Phase, CheckId),
    /// Lets a step read the present state.
    Prepare(StepId),
    /// Lets a step make its change.
    Apply(StepId),
    /// Lets a step put back what it found.
    Undo(StepId),
    /// Lets a step remove what only undo needed.
    Commit(StepId),
}

impl Call {
    /// Returns the step that is called; `None` for a check.
    pub fn step(&self) -> Option<&StepId> {
        match self {
            Call::Check(..) => None,
            Call::Prepare(step) | Call::Apply(step) | Call::Undo(step) | Call::Commit(step) => Some(step),
        }
    }
}

/// Says one thing to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Make a call.
    Call(Call),
    /// Journal that a step is about to be undone.
    BeginUndo(StepId),
    /// Journal that the run changes its state.
    Enter {
        /// The new state.
        state: RunState,
        /// Why.
        cause: Option<Cause>,
        /// For probation: when it ends.
        deadline: Option<Timestamp>,
        /// For a finished rollback: whether the system is well.
        health: Option<Health>,
    },
}

/// Says what to do next.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Decision {
    /// What to do now.
    pub actions: Vec<Action>,
    /// When to decide again though nothing happened.
    pub wake: Option<Timestamp>,
    /// Whether the driver has nothing more to do for this run.
    pub end: bool,
}

/// Holds what a decision needs beside the pipeline and the journal.
#[derive(Debug, Clone)]
pub struct Circumstances<'a> {
    /// The calls under way.
    pub in_flight: &'a BTreeSet<Call>,
    /// The time.
    pub now: Timestamp,
    /// How long undoing what is applied is expected to take, in milliseconds.
    pub undo_estimate_ms: u64,
}

impl Decision {
    fn enter(state: RunState, cause: Option<Cause>) -> Self {
        Self { actions: vec![Action::Enter { state, cause, deadline: None, health: None }], ..Self::default() }
    }

    fn wait() -> Self {
        Self::default()
    }

    fn end() -> Self {
        Self { end: true, ..Self::default() }
    }

    fn wake_at(&mut self, at: Timestamp) {
        self.wake = Some(self.wake.map_or(at, |wake| wake.min(at)));
    }

    fn call(&mut self, call: Call) {
        self.actions.push(Action::Call(call));
    }
}

/// Decides what to do next.
pub fn decide(pipeline: &Pipeline, run: &Run, around: &Circumstances<'_>) -> Decision {
    let idle = around.in_flight.is_empty();
    match run.state {
        RunState::Held | RunState::Stuck => Decision::end(),
        state if state.is_final() => Decision::end(),
        RunState::RollingBack => roll_back(pipeline, run, around),
        RunState::Committing => commit(pipeline, run, around),
        state => {
            if let Some(leave) = leave(pipeline, run, around) {
                return if idle { leave } else { Decision::wait() };
            }
            let mut decision = match state {
                RunState::Checking => check(pipeline, run, around),
                RunState::Applying => apply(pipeline, run, around),
                RunState::Verifying => verify(pipeline, run, around),
                _ => probation(pipeline, run, around),
            };
            if let Some(end) = budget_end(pipeline, run).filter(|_| state != RunState::Probation) {
                decision.wake_at(end);
            }
            decision
        }
    }
}

/// Tells whether an irreversible step has begun: from there on the run only goes forward.
pub fn is_past_pivot(pipeline: &Pipeline, run: &Run) -> bool {
    pipeline.graph.pivot().is_some()
        && pipeline.steps.values().any(|node| {
            node.irreversible_reason().is_some()
                && matches!(run.step_state(&node.id), StepState::Prepared | StepState::Applied | StepState::Committed)
        })
}

/// Tells whether running steps should be cancelled instead of awaited.
pub fn is_urgent(run: &Run) -> bool {
    match &run.failure {
        Some(Cause::Operator { .. } | Cause::Budget { .. }) => true,
        Some(Cause::Check { phase, .. }) => *phase == Phase::Guard,
        _ => false,
    }
}

/// Leaves the way forward: back after a failure, into waiting when asked to.
fn leave(pipeline: &Pipeline, run: &Run, around: &Circumstances<'_>) -> Option<Decision> {
    let over_budget = || {
        let end = budget_end(pipeline, run).filter(|end| around.now >= *end && run.state != RunState::Probation)?;
        Some(Cause::Budget { message: format!("the run's time budget was used up at {end}") })
    };
    if let Some(cause) = run.failure.clone().or_else(over_budget) {
        let state = match run.state {
            RunState::Checking => RunState::Rejected,
            _ if is_past_pivot(pipeline, run) => RunState::Held,
            _ => RunState::RollingBack,
        };
        return Some(Decision::enter(state, Some(cause)));
    }
    run.hold.clone().map(|cause| Decision::enter(RunState::Held, Some(cause)))
}

/// Returns when the run must be through; nothing for one whose time is not bounded.
pub(crate) fn budget_end(pipeline: &Pipeline, run: &Run) -> Option<Timestamp> {
    // A run that reached its probation has kept its budget: to verify it again takes none of it.
    let budget = pipeline.budget.run.filter(|_| run.deadline.is_none())?;
    run.clock_started.checked_add(jiff::SignedDuration::try_from(budget.0).ok()?).ok()
}

fn check(pipeline: &Pipeline, run: &Run, around: &Circumstances<'_>) -> Decision {
    let mut decision = Decision::default();
    let baseline = pipeline.baseline_checks();
    let done = ask(&mut decision, run, around, &Phase::Pre, pipeline.checks.iter().map(|node| &node.id))
        & ask(&mut decision, run, around, &Phase::Baseline, baseline.iter().map(|node| &node.id));
    if done { Decision::enter(RunState::Applying, None) } else { decision }
}

/// Asks what was not asked yet; tells whether every check of the phase has let the run pass.
fn ask<'a>(
    decision: &mut Decision,
    run: &Run,
    around: &Circumstances<'_>,
    phase: &Phase,
    checks: impl Iterator<Item = &'a CheckId>,
) -> bool {
    let mut done = true;
    for id in checks {
        if run.checks.contains_key(&(phase.clone(), id.clone())) {
            continue;
        }
        done = false;
        let call = Call::Check(phase.clone(), id.clone());
        if !around.in_flight.contains(&call) {
            decision.call(call);
        }
    }
    done
}

fn apply(pipeline: &Pipeline, run: &Run, around: &Circumstances<'_>) -> Decision {
    let mut decision = Decision::default();
    let mut all_done = true;
    let mut busy: BTreeSet<&StepId> = around.in_flight.iter().filter_map(Call::step).collect();
    let has_pivot = pipeline.graph.pivot().is_some();
    let runs_alone = |id: &StepId| has_pivot && pipeline.graph.node(id).is_some_and(|node| !node.reversible);
    let alone = |id: &StepId| runs_alone(id) && run.step_state(id) == StepState::Prepared;
    let pivot_runs =
        has_pivot && pipeline.graph.order().iter().any(|id| alone(id) || (runs_alone(id) && busy.contains(id)));
    let done: Vec<bool> = states(pipeline, run).iter().map(|(node, state)| is_done_in(node, *state, run)).collect();
    for (place, id) in pipeline.graph.order().iter().enumerate() {
        if done[place] {
            continue;
        }
        all_done = false;
        if busy.len() >= pipeline.max_parallel {
            break;
        }
        let ready = pipeline.graph.needs_of(place).iter().all(|needs| done[*needs]);
        if !ready || busy.contains(id) || (pivot_runs && !runs_alone(id)) {
            continue;
        }
        let alone_later = !busy.is_empty() || !is_turn_of(pipeline, run, id);
        if runs_alone(id) && run.step_state(id) == StepState::Pending && alone_later {
            continue;
        }
        let before = decision.actions.len();
        if let Some(over) = advance(&mut decision, pipeline, run, around, id) {
            return if around.in_flight.is_empty() { over } else { Decision::wait() };
        }
        if decision.actions.len() > before {
            busy.insert(id);
        }
    }
    if all_done { Decision::enter(RunState::Verifying, None) } else { decision }
}

/// Tells whether everything is done that can be done before an irreversible step.
///
/// Irreversible steps take turns in the order of the pipeline: what comes after one of them, or
/// is one of them further on, is not waited for.
fn is_turn_of(pipeline: &Pipeline, run: &Run, id: &StepId) -> bool {
    let order = pipeline.graph.order();
    let open: Vec<&StepId> = order.iter().filter(|id| !is_done(pipeline, run, id)).collect();
    let irreversible = |id: &StepId| pipeline.graph.node(id).is_some_and(|node| !node.reversible);
    let turns: Vec<&StepId> = open.iter().copied().filter(|id| irreversible(id)).collect();
    let later: BTreeSet<StepId> = turns.iter().flat_map(|turn| pipeline.graph.all_needed_by(turn)).collect();
    turns.first() == Some(&id) && open.iter().all(|other| irreversible(other) || later.contains(*other))
}

/// Takes one step one call further; answers with a turn back if its time would not fit.
fn advance(
    decision: &mut Decision,
    pipeline: &Pipeline,
    run: &Run,
    around: &Circumstances<'_>,
    id: &StepId,
) -> Option<Decision> {
    let node = pipeline.step(id)?;
    let step = run.steps.get(id);
    if let Some(retry_at) = step.and_then(|step| step.retry_at).filter(|at| *at > around.now) {
        decision.wake_at(retry_at);
        return None;
    }
    match run.step_state(id) {
        StepState::Pending => {
            // Past the pivot there is no way back that a budget could ask for.
            let past = is_past_pivot(pipeline, run);
            if !past && let Some(cause) = does_not_fit(pipeline, run, around, &node.policy, id) {
                return Some(Decision::enter(RunState::RollingBack, Some(cause)));
            }
            // The first irreversible step may turn out unchanged: the next one is the pivot then.
            let is_pivot = node.irreversible_reason().is_some() && !past;
            if is_pivot && !ask(decision, run, around, &Phase::Pivot, pipeline.pivot_checks().iter().map(|(id, _)| id))
            {
                return None;
            }
            let phase = Phase::Before(id.clone());
            if ask(decision, run, around, &phase, node.before.iter().map(|node| &node.id)) {
                decision.call(Call::Prepare(id.clone()));
            }
        }
        StepState::Prepared => decision.call(Call::Apply(id.clone())),
        StepState::Applied => {
            ask(decision, run, around, &Phase::After(id.clone()), node.after.iter().map(|node| &node.id));
        }
        _ => {}
    }
    None
}

fn does_not_fit(
    pipeline: &Pipeline,
    run: &Run,
    around: &Circumstances<'_>,
    policy: &StepPolicy,
    id: &StepId,
) -> Option<Cause> {
    let end = budget_end(pipeline, run)?;
    // A timeout that nobody chose is not a promise about how long the step takes.
    let need = if policy.timeout == StepPolicy::default().timeout { 0 } else { policy.timeout.0.as_millis() };
    let need = i128::try_from(need).unwrap_or(i128::MAX).saturating_add(i128::from(around.undo_estimate_ms));
    let left = end.duration_since(around.now).as_millis();
    (left < need).then(|| Cause::Budget {
        message: format!("step `{id}` may take {need} ms with its undo, and {left} ms of the run's budget are left"),
    })
}

/// Lists the steps in order, each with its state: one walk over both lists, no look-up a step.
fn states<'a>(pipeline: &'a Pipeline, run: &Run) -> Vec<(&'a StepNode, StepState)> {
    let mut begun = run.steps.iter().peekable();
    let by_id: Vec<_> = pipeline
        .steps
        .iter()
        .map(|(id, node)| {
            while begun.next_if(|(other, _)| *other < id).is_some() {}
            let step = begun.next_if(|(other, _)| *other == id);
            (node, step.map_or(StepState::Pending, |(_, step)| step.state()))
        })
        .collect();
    pipeline.graph.ranks().iter().map(|rank| by_id[*rank]).collect()
}

/// Tells whether what needs a step may start: it is applied and its own checks have passed.
fn is_done(pipeline: &Pipeline, run: &Run, id: &StepId) -> bool {
    pipeline.step(id).is_some_and(|node| is_done_in(node, run.step_state(id), run))
}

fn is_done_in(node: &StepNode, state: StepState, run: &Run) -> bool {
    match state {
        StepState::Applied => {
            node.after.iter().all(|check| run.checks.contains_key(&(Phase::After(node.id.clone()), check.id.clone())))
        }
        state => state.lets_dependents_start(),
    }
}

fn verify(pipeline: &Pipeline, run: &Run, around: &Circumstances<'_>) -> Decision {
    let mut decision = Decision::default();
    if !ask(&mut decision, run, around, &Phase::Verify, pipeline.verify.iter().map(|node| &node.id)) {
        return decision;
    }
    let span = match pipeline.commit {
        _ if run.confirmed => return Decision::enter(RunState::Committing, None),
        CommitMode::Now => return Decision::enter(RunState::Committing, None),
        CommitMode::After(span) | CommitMode::ConfirmWithin(span) => span,
    };
    let from_now =
        |span: Duration| jiff::SignedDuration::try_from(span).ok().and_then(|span| around.now.checked_add(span).ok());
    // A probation that is taken up again ends when it would have ended; but nobody watched
    // meanwhile, and without a look at the guards nobody knows whether they stayed clean.
    let deadline = match (run.deadline, pipeline.commit) {
        (Some(end), CommitMode::After(_)) => {
            let look = longest_look(pipeline).and_then(|look| from_now(look.min(span.0)));
            Some(look.map_or(end, |look| look.max(end)))
        }
        (Some(end), _) => Some(end),
        (None, _) => from_now(span.0),
    };
    Decision {
        actions: vec![Action::Enter { state: RunState::Probation, cause: None, deadline, health: None }],
        ..Decision::default()
    }
}

/// Returns how long the guards need to show a breach, or that they do not know.
fn longest_look(pipeline: &Pipeline) -> Option<Duration> {
    let acting = pipeline.guards.iter().filter(|guard| guard.action != GuardAction::Warn);
    let answers = |guard: &GuardNode| guard.every.0.saturating_add(guard.check.policy.timeout.0).saturating_mul(3);
    acting.map(|guard| answers(guard).saturating_add(guard.breach_for.0)).max()
}

fn probation(pipeline: &Pipeline, run: &Run, around: &Circumstances<'_>) -> Decision {
    let over = run.deadline.is_some_and(|deadline| around.now >= deadline);
    if over
        && !run.confirmed
        && let (CommitMode::ConfirmWithin(_), Some(deadline)) = (pipeline.commit, run.deadline)
    {
        let state = if is_past_pivot(pipeline, run) { RunState::Held } else { RunState::RollingBack };
        return Decision::enter(state, Some(Cause::NotConfirmed { deadline }));
    }
    if !run.verified {
        return Decision::enter(RunState::Verifying, None);
    }
    if over || run.confirmed {
        return Decision::enter(RunState::Committing, None);
    }
    Decision { wake: run.deadline, ..Decision::default() }
}

/// Waits for what is under way, then for an operator, if anything asks for it.
fn hold(run: &Run, around: &Circumstances<'_>) -> Option<Decision> {
    let cause = run.hold.clone()?;
    Some(if around.in_flight.is_empty() { Decision::enter(RunState::Held, Some(cause)) } else { Decision::wait() })
}

fn commit(pipeline: &Pipeline, run: &Run, around: &Circumstances<'_>) -> Decision {
    if let Some(wait) = hold(run, around) {
        return wait;
    }
    let mut decision = Decision::default();
    let mut all_done = true;
    let states = states(pipeline, run);
    // What a step needs stands before it in the order. One that was unchanged opens no way past
    // those that it needs.
    let mut committed = Vec::with_capacity(states.len());
    for (place, (_, state)) in states.iter().enumerate() {
        let ready = pipeline.graph.needs_of(place).iter().all(|needs| committed[*needs]);
        committed.push(ready && *state != StepState::Applied);
    }
    for (place, id) in pipeline.graph.order().iter().enumerate() {
        if states[place].1 != StepState::Applied {
            continue;
        }
        all_done = false;
        if around.in_flight.len() + decision.actions.len() >= pipeline.max_parallel {
            break;
        }
        let call = Call::Commit(id.clone());
        let ready = pipeline.graph.needs_of(place).iter().all(|needs| committed[*needs]);
        if !ready || around.in_flight.contains(&call) {
            continue;
        }
        match run.steps.get(id).and_then(|step| step.retry_at).filter(|at| *at > around.now) {
            Some(retry_at) => decision.wake_at(retry_at),
            None => decision.call(call),
        }
    }
    if all_done { Decision::enter(RunState::Committed, None) } else { decision }
}

fn roll_back(pipeline: &Pipeline, run: &Run, around: &Circumstances<'_>) -> Decision {
    if let Some(wait) = hold(run, around) {
        return wait;
    }
    let mut decision = Decision::default();
    // Nothing is undone beside a call that may still change something.
    if around.in_flight.iter().any(|call| matches!(call, Call::Prepare(_) | Call::Apply(_))) {
        return decision;
    }
    let mut waiting = !around.in_flight.is_empty();
    // Steps that are not back, or that something needs which is not, directly or through others: one
    // that was unchanged opens no way past those that need it.
    let mut ahead: BTreeSet<&StepId> = BTreeSet::new();
    for id in pipeline.graph.order().iter().rev() {
        let ready = pipeline.graph.needed_by(id).all(|later| !ahead.contains(later));
        if !ready || !run.step_state(id).is_back() {
            ahead.insert(id);
        }
        let call = Call::Undo(id.clone());
        let room = around.in_flight.len() + decision.actions.len() < pipeline.max_parallel;
        match run.step_state(id) {
            StepState::Prepared | StepState::Applied if ready => {
                waiting = true;
                if room {
                    decision.actions.push(Action::BeginUndo(id.clone()));
                }
            }
            StepState::Undoing if !around.in_flight.contains(&call) => {
                waiting = true;
                match run.steps.get(id).and_then(|step| step.retry_at).filter(|at| *at > around.now) {
                    Some(retry_at) => decision.wake_at(retry_at),
                    None if room => decision.call(call),
                    None => {}
                }
            }
            _ => {}
        }
    }
    if waiting {
        return decision;
    }
    if run.in_state(StepState::UndoFailed).next().is_some() {
        return Decision::enter(RunState::Stuck, None);
    }
    if run.in_state(StepState::Abandoned).next().is_some() {
        return Decision::enter(RunState::Abandoned, None);
    }
    finish_rollback(pipeline, run, around)
}

fn finish_rollback(pipeline: &Pipeline, run: &Run, around: &Circumstances<'_>) -> Decision {
    let mut decision = Decision::default();
    let checks: Vec<&CheckId> = pipeline
        .rollback_checks()
        .iter()
        .map(|node| &node.id)
        .filter(|id| pipeline.rollback_verify.is_some() || had_passed(run, id))
        .collect();
    if !ask(&mut decision, run, around, &Phase::RollbackVerify, checks.iter().copied()) {
        return decision;
    }
    let well = checks.iter().all(|id| {
        let verdict = run.checks.get(&(Phase::RollbackVerify, (*id).clone()));
        verdict.is_some_and(|verdict| matches!(verdict.status, Status::Pass | Status::Warn))
    });
    let health = if well { Health::Restored } else { Health::RestoredButUnhealthy };
    let enter = Action::Enter { state: RunState::RolledBack, cause: None, deadline: None, health: Some(health) };
    Decision { actions: vec![enter], ..Decision::default() }
}

fn had_passed(run: &Run, id: &CheckId) -> bool {
    let verdict = run.checks.get(&(Phase::Pre, id.clone()));
    verdict.is_some_and(|verdict| matches!(verdict.status, Status::Pass | Status::Warn))
}

/// Tells whether a guard is watching in the present state of the run.
pub(crate) fn is_watching(guard: &GuardNode, pipeline: &Pipeline, run: &Run) -> bool {
    if !matches!(run.state, RunState::Applying | RunState::Verifying | RunState::Probation) {
        return false;
    }
    let begun = |id: &StepId| run.step_state(id) != StepState::Pending;
    let started = match &guard.from {
        Some(step) => begun(step),
        None => run.state != RunState::Applying || pipeline.graph.order().iter().any(begun),
    };
    let ended = guard.until.as_ref().is_some_and(|step| is_done(pipeline, run, step));
    // A planned stop begins with the first of its steps and ends when the last is done.
    let paused =
        guard.pause_during.iter().any(begun) && !guard.pause_during.iter().all(|id| is_done(pipeline, run, id));
    started && !ended && !paused
}

impl Pipeline {
    /// Lists the checks that are measured before the run only to compare with later.
    pub(crate) fn baseline_checks(&self) -> Vec<&CheckNode> {
        let guards = self.guards.iter().map(|guard| &guard.check);
        let steps = self.steps.values().flat_map(|node| node.before.iter().chain(&node.after));
        let mut seen: BTreeSet<&CheckId> = self.checks.iter().map(|node| &node.id).collect();
        self.verify
            .iter()
            .chain(guards)
            .chain(steps)
            .chain(self.rollback_checks())
            .filter(|node| node.needs_baseline() && seen.insert(&node.id))
            .collect()
    }

    /// Lists what is asked again just before the first irreversible step: pre-checks and guards.
    pub(crate) fn pivot_checks(&self) -> Vec<(CheckId, &CheckNode)> {
        let checks = self.checks.iter().map(|node| (node.id.clone(), node));
        let guards = self.guards.iter().filter(|guard| guard.action != GuardAction::Warn).filter_map(|guard| {
            let id = CheckId::try_from(format!("guard.{}", guard.check.id)).ok()?;
            Some((id, &guard.check))
        });
        checks.chain(guards).collect()
    }
}
