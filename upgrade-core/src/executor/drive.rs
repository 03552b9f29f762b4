//! The driver: turns decisions into journal entries and calls, and what comes back into entries.
//!
//! ```text
//!        ┌──────────────► decide (pure) ─────────────┐
//!        │                                           ▼
//!   state of the run                        entries and calls
//!        ▲                                           │
//!        │         1. append the entries, durably    │
//!        └──────── 2. tell the observers ◄───────────┘
//!                  3. only then make the calls, and wait for one to end
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;

use super::calls::{Caller, Checkpoint, Ended};
use super::clock::Clock;
use super::decide::{Action, Call, Circumstances, Decision, budget_end, is_past_pivot, is_urgent};
use super::guards::{Guards, Sample};
use super::state::Run;
use super::{Executor, ExecutorError, Interrupt, Outcome, Report, RunOptions};
use crate::context::Direction;
use crate::entry::{Cause, Demand, Entry, Request};
use crate::erased::AnyPrepared;
use crate::error::{Class, StepError};
use crate::journal::Lease;
use crate::names::StepId;
use crate::pipeline::Pipeline;
use crate::transition::{RunState, StepState};

/// How often requests of other processes are looked for and the lease is verified.
const POLL: Duration = Duration::from_millis(200);

/// How long a driver that halts waits for its cancelled calls to return.
const HALT_GRACE: Duration = Duration::from_secs(30);

/// Decides what to do next; replaced only to try whether the sweeps notice.
pub(crate) type Decide = fn(&Pipeline, &Run, &Circumstances<'_>) -> Decision;

struct Flight {
    call: Call,
    cancelled: CancellationToken,
    started: Instant,
}

pub(crate) struct Driver<'a> {
    pub(super) executor: &'a Executor,
    pub(super) pipeline: Arc<Pipeline>,
    lease: Arc<Lease>,
    pub(super) run: Run,
    pub(super) caller: Caller,
    tasks: JoinSet<Ended>,
    flights: BTreeMap<Id, Flight>,
    in_flight: BTreeSet<Call>,
    checkpoints: mpsc::UnboundedReceiver<Checkpoint>,
    samples: mpsc::UnboundedReceiver<Sample>,
    guards: Guards,
    /// Entries that are decided and not yet durable.
    pub(super) pending: Vec<Entry>,
    /// Who waits for those entries.
    waiting: Vec<oneshot::Sender<()>>,
    undo_estimates_ms: BTreeMap<StepId, u64>,
    interrupted: u8,
    withdraw: Vec<String>,
    detach: bool,
}

impl<'a> Driver<'a> {
    pub(crate) async fn new(
        executor: &'a Executor,
        pipeline: &Pipeline,
        lease: Lease,
        run: Run,
        undo_estimates_ms: BTreeMap<StepId, u64>,
    ) -> Result<Driver<'a>, ExecutorError> {
        let (checkpoint_sender, checkpoints) = mpsc::unbounded_channel();
        let (sample_sender, samples) = mpsc::unbounded_channel();
        let pipeline = Arc::new(pipeline.clone());
        let lease = Arc::new(lease);
        let caller = Caller {
            pipeline: pipeline.clone(),
            secrets: executor.secrets_of(&pipeline),
            sealed: executor.journal.sealed(run.id()).await?,
            observers: executor.observers.clone(),
            checkpoints: checkpoint_sender,
            lease: Some(lease.clone()),
            clock: Clock::new(),
            dry_run: false,
        };
        Ok(Self {
            executor,
            guards: Guards::new(sample_sender),
            pipeline,
            lease,
            run,
            caller,
            tasks: JoinSet::new(),
            flights: BTreeMap::new(),
            in_flight: BTreeSet::new(),
            checkpoints,
            samples,
            pending: Vec::new(),
            waiting: Vec::new(),
            undo_estimates_ms,
            interrupted: 0,
            withdraw: Vec::new(),
            detach: false,
        })
    }

    /// Puts the entry that makes the run before all others.
    pub(crate) fn begin(&mut self, created: Option<Entry>) {
        self.pending.extend(created);
    }

    /// Takes an entry into the state; it becomes durable with the next [`Driver::flush`].
    pub(crate) fn note(&mut self, entry: Entry) -> Result<(), ExecutorError> {
        self.run.apply(&entry, self.caller.clock.now()).map_err(|reason| ExecutorError::Corrupt {
            run: self.run.id().to_string(),
            line: self.run.entries() + 1,
            reason,
        })?;
        self.pending.push(entry);
        Ok(())
    }

    /// Makes the pending entries durable and tells who waits for them.
    pub(crate) async fn flush(&mut self) -> Result<(), ExecutorError> {
        if !self.pending.is_empty() {
            self.release().await;
            let at = self.run.entries() - self.pending.len() as u64;
            let records = self.executor.journal.append(&self.lease, self.run.id(), at, &self.pending).await?;
            self.pending.clear();
            for record in &records {
                self.executor.observers.entry(self.run.id(), record);
            }
        }
        for waiting in self.waiting.drain(..) {
            // A call that was cancelled meanwhile no longer waits.
            let _ = waiting.send(());
        }
        for id in std::mem::take(&mut self.withdraw) {
            self.executor.journal.withdraw(self.run.id(), &id).await?;
        }
        Ok(())
    }

    /// Drives the run until there is nothing more to do, or the journal fails.
    pub(crate) async fn drive(mut self, options: &RunOptions, interrupt: &Interrupt) -> Result<Report, ExecutorError> {
        self.detach = options.detach;
        let result = self.drive_on(interrupt).await;
        self.guards.stop();
        if result.is_err() {
            self.halt().await;
        }
        self.executor.observers.flush().await;
        let outcome = result?;
        if self.run.state.is_final() && self.run.state != RunState::Abandoned {
            // What a crash leaves here is cleared by the next run.
            if let Err(error) = self.caller.sealed.clear().await {
                tracing::warn!(%error, "found contents could not be removed");
            }
        }
        Ok(Report { run: self.run.id().clone(), outcome })
    }

    async fn drive_on(&mut self, interrupt: &Interrupt) -> Result<Outcome, ExecutorError> {
        let mut level = interrupt.level.subscribe();
        let mut poll = interval(POLL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let pulled = *level.borrow_and_update();
            self.pull(pulled)?;
            let (wake, end) = self.advance().await?;
            if let Some(outcome) = end {
                return Ok(outcome);
            }
            let wake = wake.map(|at| Instant::now() + self.caller.clock.until(at));
            tokio::select! {
                biased;
                Some(joined) = self.tasks.join_next_with_id() => self.absorb(joined)?,
                Some(checkpoint) = self.checkpoints.recv() => self.checkpoint(checkpoint)?,
                Some(sample) = self.samples.recv() => self.sample(&sample)?,
                Ok(()) = level.changed() => {}
                _ = poll.tick() => self.look_around().await?,
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {}
            }
            // What has come in meanwhile becomes durable in the same write.
            while let Some(joined) = self.tasks.try_join_next_with_id() {
                self.absorb(joined)?;
            }
            while let Ok(checkpoint) = self.checkpoints.try_recv() {
                self.checkpoint(checkpoint)?;
            }
        }
    }

    /// Decides until calls must be made, journals, and makes them.
    async fn advance(&mut self) -> Result<(Option<Timestamp>, Option<Outcome>), ExecutorError> {
        let mut calls = Vec::new();
        let decision = loop {
            let around = Circumstances {
                in_flight: &self.in_flight,
                now: self.caller.clock.now(),
                undo_estimate_ms: self.undo_estimate(),
            };
            let decision = (self.executor.decide)(&self.pipeline, &self.run, &around);
            let mut journaled = false;
            for action in &decision.actions {
                match action {
                    Action::Enter { state, cause, deadline, health } => {
                        journaled = true;
                        let (state, cause) = (*state, cause.clone());
                        self.note(Entry::RunEntered { state, cause, deadline: *deadline, health: *health })?;
                    }
                    Action::BeginUndo(step) => {
                        journaled = true;
                        self.note(Entry::StepUndoing { step: step.clone() })?;
                    }
                    Action::Call(call) => {
                        self.in_flight.insert(call.clone());
                        calls.push(call.clone());
                    }
                }
            }
            if !journaled {
                break decision;
            }
        };
        // A commit that is repeated converges: what was committed may become durable with what comes
        // next, with the next look around at the latest.
        let may_wait = self.pending.iter().all(|entry| matches!(entry, Entry::StepCommitted { .. }));
        if may_wait && !calls.is_empty() {
            self.lease.verify().await?;
        } else {
            // No append is taken from a driver that lost its lease: calls need no further proof.
            self.flush().await?;
        }
        if self.is_urgent() {
            self.flights.values().for_each(|flight| flight.cancelled.cancel());
        }
        for call in calls {
            self.start(call)?;
        }
        self.guards.watch(&self.pipeline, &self.run, &self.caller);
        let detached = self.detach && self.run.state == RunState::Probation;
        let ended = (decision.end && self.in_flight.is_empty()) || (detached && self.in_flight.is_empty());
        Ok((decision.wake, if ended { Some(outcome_of(&self.run)) } else { None }))
    }

    fn undo_estimate(&self) -> u64 {
        if self.undo_estimates_ms.is_empty() {
            return 0;
        }
        let applied =
            self.run.steps.iter().filter(|(_, s)| matches!(s.state(), StepState::Prepared | StepState::Applied));
        applied.filter_map(|(id, _)| self.undo_estimates_ms.get(id)).sum()
    }

    fn start(&mut self, call: Call) -> Result<(), ExecutorError> {
        let cancelled = CancellationToken::new();
        let budget_end = budget_end(&self.pipeline, &self.run).filter(|_| !is_past_pivot(&self.pipeline, &self.run));
        match self.caller.call(&call, &self.run, &cancelled, budget_end) {
            Ok(work) => {
                let id = self.tasks.spawn(work).id();
                self.flights.insert(id, Flight { call, cancelled, started: Instant::now() });
                Ok(())
            }
            Err(error) => {
                self.in_flight.remove(&call);
                let ended = failed(&call, error);
                self.conclude(&call, ended, 0)
            }
        }
    }

    fn absorb(&mut self, joined: Result<(Id, Ended), JoinError>) -> Result<(), ExecutorError> {
        let (id, ended) = match joined {
            Ok((id, ended)) => (id, Ok(ended)),
            Err(error) => (error.id(), Err(error)),
        };
        let Some(flight) = self.flights.remove(&id) else { return Ok(()) };
        self.in_flight.remove(&flight.call);
        let elapsed_ms = u64::try_from(flight.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let ended = ended.unwrap_or_else(|error| failed(&flight.call, panicked(error)));
        self.conclude(&flight.call, ended, elapsed_ms)
    }

    /// Turns what came of a call into an entry.
    fn conclude(&mut self, call: &Call, ended: Ended, elapsed_ms: u64) -> Result<(), ExecutorError> {
        let mask = |text: &str| self.caller.secrets.mask(text);
        let entry = match (call, ended) {
            (Call::Check(phase, check), Ended::Checked(verdict)) => {
                Entry::CheckReported { phase: phase.clone(), check: check.clone(), verdict, elapsed_ms }
            }
            (Call::Prepare(step), Ended::Skipped(reason)) => Entry::StepSkipped { step: step.clone(), reason },
            // The run turned away meanwhile: what was read is not acted on, and is read again
            // should the step's turn come. An irreversible step has not begun, either.
            (Call::Prepare(_), Ended::Prepared(Ok(_))) if self.is_turning_away() => return Ok(()),
            (Call::Prepare(step), Ended::Prepared(Ok(prepared))) => match prepared {
                AnyPrepared::Change { undo, mut changes } => {
                    if self.caller.secrets.are_in(&undo.value) {
                        let error =
                            StepError::permanent(format!("step `{step}` would write a secret into its undo record"))
                                .with_hint(
                                    "a secret that is also part of a name or a path is taken for one: choose another; \
                                     else it is a defect of the step kind: found contents belong in sealed storage",
                                );
                        return self.fail(call, error, elapsed_ms);
                    }
                    for change in &mut changes {
                        change.subject = mask(&change.subject);
                        change.summary = change.summary.as_deref().map(mask);
                        change.diff = change.diff.as_deref().map(mask);
                        change.undo_loses = change.undo_loses.as_deref().map(mask);
                    }
                    Entry::StepPrepared { step: step.clone(), undo, changes }
                }
                AnyPrepared::Unchanged { mut output, reason } => {
                    mask_value(&mut output.value, &mask);
                    Entry::StepUnchanged { step: step.clone(), output, reason: mask(&reason) }
                }
                AnyPrepared::KnownAfter { step: other } => {
                    let error =
                        StepError::permanent(format!("it waits for `{other}` though nothing is left to wait for"));
                    return self.fail(call, error, elapsed_ms);
                }
            },
            (Call::Apply(step), Ended::Applied(Ok(mut output))) => {
                mask_value(&mut output.value, &mask);
                Entry::StepApplied { step: step.clone(), output, elapsed_ms }
            }
            (Call::Undo(step), Ended::Undone(Ok(()))) => Entry::StepUndone { step: step.clone(), elapsed_ms },
            (Call::Commit(step), Ended::Committed(Ok(()))) => Entry::StepCommitted { step: step.clone() },
            (
                _,
                Ended::Prepared(Err(error))
                | Ended::Applied(Err(error))
                | Ended::Undone(Err(error))
                | Ended::Committed(Err(error)),
            ) => {
                return self.fail(call, error, elapsed_ms);
            }
            (_, Ended::Unresponsive(direction)) => {
                let Some(step) = call.step().cloned() else { return Ok(()) };
                let cause = Cause::Unresponsive { step, direction };
                Entry::RunEntered { state: RunState::Held, cause: Some(cause), deadline: None, health: None }
            }
            (call, ended) => {
                return Err(ExecutorError::Corrupt {
                    run: self.run.id().to_string(),
                    line: self.run.entries() + 1,
                    reason: format!("{call:?} ended as {ended:?}"),
                });
            }
        };
        if matches!(&entry, Entry::RunEntered { .. }) && self.run.state == RunState::Held {
            return Ok(());
        }
        self.note(entry)
    }

    /// Tells whether running steps are cancelled; past the pivot never: what cannot be undone is
    /// better done than broken off.
    fn is_urgent(&self) -> bool {
        is_urgent(&self.run) && !is_past_pivot(&self.pipeline, &self.run)
    }

    fn is_turning_away(&self) -> bool {
        self.run.state != RunState::Applying || self.run.failure.is_some() || self.run.hold.is_some()
    }

    fn fail(&mut self, call: &Call, error: StepError, elapsed_ms: u64) -> Result<(), ExecutorError> {
        let Some(step) = call.step().cloned() else { return Ok(()) };
        let error = error.map_text(|text| self.caller.secrets.mask(text));
        let policy = self.pipeline.step(&step).map(|node| node.policy).unwrap_or_default();
        let (failures, attempt) = self.run.steps.get(&step).map_or((0, 0), |step| (step.failures, step.tries));
        let (direction, retry) = match call {
            Call::Undo(_) => (Direction::Back, policy.undo_retry),
            Call::Commit(_) => (Direction::Commit, policy.undo_retry),
            _ => (Direction::Forward, policy.retry),
        };
        // Forward, only what may pass by itself is tried again; back, everything is, except a
        // foreign change, which no repetition mends.
        let worth_it = match direction {
            Direction::Forward => error.class() == Class::Transient && !self.is_urgent(),
            Direction::Back | Direction::Commit => error.as_conflict().is_none(),
        };
        let delay = retry.delay_after(failures + 1).filter(|_| worth_it);
        let retry_at = delay
            .and_then(|delay| self.caller.clock.now().checked_add(jiff::SignedDuration::try_from(delay).ok()?).ok());
        self.note(Entry::StepFailed { step, direction, attempt: attempt + 1, error, retry_at, elapsed_ms })
    }

    fn checkpoint(&mut self, checkpoint: Checkpoint) -> Result<(), ExecutorError> {
        let Checkpoint { step, direction, value, durable } = checkpoint;
        self.waiting.push(durable);
        self.note(Entry::StepCheckpoint { step, direction, checkpoint: value })
    }

    fn sample(&mut self, sample: &Sample) -> Result<(), ExecutorError> {
        match self.guards.judge(&self.pipeline, &self.run, sample) {
            Some(entry) => self.note(entry),
            None => Ok(()),
        }
    }

    /// Takes requests of other processes up, and raises the alarm about a rollback that takes long.
    async fn look_around(&mut self) -> Result<(), ExecutorError> {
        self.lease.verify().await?;
        // A held run only waits for its last calls: whoever asks takes it up when they are back,
        // since nothing may be begun or undone beside them.
        let requests = match self.run.state {
            RunState::Held => Vec::new(),
            _ => self.executor.journal.requests(self.run.id()).await?,
        };
        for request in requests {
            self.withdraw.push(request.id.clone());
            self.take_up(request)?;
        }
        if let (Some(budget), Some(started), false) =
            (self.pipeline.budget.rollback, self.run.rollback_started, self.run.alarmed)
            && self.run.state == RunState::RollingBack
        {
            let taken = self.caller.clock.now().duration_since(started);
            if taken > jiff::SignedDuration::try_from(budget.0).unwrap_or(jiff::SignedDuration::MAX) {
                let message = format!("the rollback takes longer than its budget of {budget}; it goes on");
                self.note(Entry::BudgetAlarm { message })?;
            }
        }
        Ok(())
    }

    fn pull(&mut self, level: u8) -> Result<(), ExecutorError> {
        while self.interrupted < level && self.run.state != RunState::Held {
            self.interrupted += 1;
            let demand = match self.interrupted {
                1 => Demand::Stop { reason: "interrupted".into() },
                _ => Demand::Rollback { reason: "interrupted twice".into() },
            };
            self.take_up(Request::new(demand))?;
        }
        Ok(())
    }

    /// Journals a request with its answer, and what follows from it.
    ///
    /// One that the journal shows answered is not taken up again: a crash may come between the
    /// answer and its withdrawal.
    pub(crate) fn take_up(&mut self, request: Request) -> Result<(), ExecutorError> {
        if self.run.has_answered(&request.id) {
            return Ok(());
        }
        let refused = super::requests::refusal(&self.pipeline, &self.run, &request.demand);
        let follows = if refused.is_none() {
            super::requests::consequences(&self.pipeline, &self.run, &request)
        } else {
            Vec::new()
        };
        let id = request.id.clone();
        self.note(Entry::RequestReceived { request })?;
        self.note(Entry::RequestAnswered { id, refused })?;
        follows.into_iter().try_for_each(|entry| self.note(entry))
    }

    /// Ends what is under way after the journal failed: nothing is applied or undone any more.
    async fn halt(&mut self) {
        self.waiting.clear();
        self.checkpoints.close();
        while self.checkpoints.try_recv().is_ok() {}
        self.flights.values().for_each(|flight| flight.cancelled.cancel());
        let all = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(HALT_GRACE, all).await.is_err() {
            tracing::error!("calls did not return after the run was halted");
            // Each keeps the lease: nobody goes on beside a call that may still change something.
            self.tasks.detach_all();
        }
    }
}

fn panicked(error: JoinError) -> StepError {
    let what = if error.is_panic() {
        let panic = error.into_panic();
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        format!("it panicked: {}", text.unwrap_or("no message"))
    } else {
        "it was aborted".to_owned()
    };
    StepError::unknown(what).with_hint("this is a defect of the step kind; what it did until then is undone")
}

fn failed(call: &Call, error: StepError) -> Ended {
    match call {
        Call::Check(..) => Ended::Checked(crate::verdict::Verdict::unknown(error.message())),
        Call::Prepare(_) => Ended::Prepared(Err(error)),
        Call::Apply(_) => Ended::Applied(Err(error)),
        Call::Undo(_) => Ended::Undone(Err(error)),
        Call::Commit(_) => Ended::Committed(Err(error)),
    }
}

fn mask_value(value: &mut serde_json::Value, mask: &impl Fn(&str) -> String) {
    match value {
        serde_json::Value::String(text) => *text = mask(text),
        serde_json::Value::Array(items) => items.iter_mut().for_each(|item| mask_value(item, mask)),
        serde_json::Value::Object(map) => {
            for (name, mut item) in std::mem::take(map) {
                mask_value(&mut item, mask);
                map.insert(mask(&name), item);
            }
        }
        _ => {}
    }
}

/// Says how a run stands when its driver has nothing more to do.
pub(crate) fn outcome_of(run: &Run) -> Outcome {
    let cause = run.cause.clone();
    match run.state {
        RunState::Committed => Outcome::Committed,
        RunState::RolledBack => {
            Outcome::RolledBack { cause, health: run.health.unwrap_or(crate::entry::Health::RestoredButUnhealthy) }
        }
        RunState::Rejected => Outcome::Rejected { cause },
        RunState::Stuck => Outcome::Stuck { steps: run.stuck_steps(), cause },
        RunState::Abandoned => {
            Outcome::Abandoned { steps: run.in_state(StepState::Abandoned).map(|(id, _)| id.clone()).collect() }
        }
        RunState::Probation => Outcome::Probation { deadline: run.deadline },
        state => Outcome::Held { cause, state: run.held_from.unwrap_or(state) },
    }
}
