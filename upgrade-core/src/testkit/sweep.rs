//! Sweeps: a scenario lived through again and again, with one thing going wrong each time.
//!
//! A sweep first runs the scenario undisturbed and notes the world before and after. Then, from a
//! fresh world each time, it dies at every append of the journal (before and after it is durable),
//! shortly after every call on a step, fails every step and every undo, repeats every call, and
//! lets somebody else change what a step works on. Whatever happened, the run is taken up again
//! or rolled back, and the world must be exactly the one before or the one after.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use super::Mutation;
use super::faults::{Fault, When};
use super::journals::{Dying, Side};
use super::order::order_violations;
use crate::entry::{Demand, Entry, Health, Resolution};
use crate::executor::{Answer, Executor, ExecutorError, Interrupt, Outcome, Report, RunOptions};
use crate::journal::{Journal, MemoryJournal};
use crate::names::{RunId, StepId};
use crate::pipeline::Pipeline;
use crate::transition::RunState;

/// How long one driven run of a case may take before the case counts as hung.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long after the start of a call a crash comes, in a sweep of crashes inside calls.
const INSIDE: [Duration; 3] = [Duration::ZERO, Duration::from_millis(2), Duration::from_millis(20)];

/// Describes what a sweep lives through.
///
/// Each case gets a fresh world. `pipeline` is called anew for every driver, within its runtime,
/// so that connections are made where they are used.
pub trait Scenario: Sync {
    /// Holds what the steps work on: a directory, a database, a container.
    type World;

    /// Makes a world as it is before the upgrade.
    fn fresh(&self) -> Self::World;

    /// Makes the pipeline that upgrades the world.
    fn pipeline(&self, world: &Self::World) -> Pipeline;

    /// Writes down all of the world that must be right; two equal worlds give equal texts.
    fn observe(&self, world: &Self::World) -> String;

    /// Makes the change of somebody else to what `step` works on; says false if there is none to
    /// make.
    fn interfere(&self, _world: &Self::World, _step: &StepId) -> bool {
        false
    }

    /// Tells whether the change of somebody else is still there.
    fn survived(&self, _world: &Self::World, _step: &StepId) -> bool {
        true
    }
}

/// Lives through a scenario with one thing going wrong at a time.
pub struct Sweep<'a, S> {
    scenario: &'a S,
    mutation: Option<Mutation>,
    stride: u64,
    inside_calls: bool,
}

/// Counts what a sweep lived through.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SweepReport {
    /// How many cases.
    pub cases: usize,
    /// How many appends the undisturbed run made.
    pub appends: u64,
}

/// Names the case that broke the promise.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct SweepFailure {
    /// What went wrong on purpose.
    pub case: String,
    /// What was wrong afterwards.
    pub message: String,
}

impl fmt::Display for SweepFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.case, self.message)
    }
}

/// Says how a case is driven to an end after its crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Resume,
    RollBack,
}

struct Reference {
    before: String,
    after: String,
    appends: u64,
    appends_back: u64,
    steps: Vec<StepId>,
}

/// What one driver did until it ended or died.
enum Driven {
    Ended(Result<Box<Report>, ExecutorError>),
    Died,
}

impl<'a, S: Scenario> Sweep<'a, S> {
    /// Prepares a sweep.
    pub fn new(scenario: &'a S) -> Self {
        Self { scenario, mutation: None, stride: 1, inside_calls: true }
    }

    /// Seeds a defect, to see the sweep notice it.
    #[must_use]
    pub fn with_mutation(mut self, mutation: Mutation) -> Self {
        self.mutation = Some(mutation);
        self
    }

    /// Dies only at every n-th append: for scenarios whose world is slow to make.
    #[must_use]
    pub fn every(mut self, stride: u64) -> Self {
        self.stride = stride.max(1);
        self
    }

    /// Leaves out the crashes inside calls.
    #[must_use]
    pub fn only_between_calls(mut self) -> Self {
        self.inside_calls = false;
        self
    }

    /// Lives through every case.
    ///
    /// # Errors
    /// The first case after which the world, the outcome or the order of the journal is wrong.
    pub fn run(&self) -> Result<SweepReport, SweepFailure> {
        let reference = self.reference()?;
        let mut report = SweepReport { cases: 0, appends: reference.appends };
        let mut case = |name: String, result: Result<(), String>| {
            report.cases += 1;
            result.map_err(|message| SweepFailure { case: name, message })
        };
        for step in &reference.steps {
            for fault in [Fault::Prepare, Fault::Apply(When::Before), Fault::Apply(When::After)] {
                case(format!("step `{step}` fails ({fault:?})"), self.failing_step(&reference, step, fault))?;
            }
            for when in [When::Before, When::After] {
                case(format!("the undo of `{step}` fails once ({when:?})"), self.failing_undo(&reference, step, when))?;
                case(format!("the undo of `{step}` fails for good ({when:?})"), self.stuck(&reference, step, when))?;
                case(
                    format!("the commit of `{step}` fails once ({when:?})"),
                    self.failing_commit(&reference, step, when),
                )?;
            }
            case(format!("every call on `{step}` is made twice"), self.repeating(&reference, step))?;
            for call in ["apply", "undo"] {
                case(format!("a foreign change before `{call}` of `{step}`"), self.foreign(&reference, step, call))?;
            }
        }
        for at in (1..=reference.appends).step_by(usize::try_from(self.stride).unwrap_or(1)) {
            for side in [Side::Before, Side::After] {
                for then in [Then::Resume, Then::RollBack] {
                    let name = format!("death at append {at} ({side:?} it is durable), then {then:?}");
                    case(name, self.dying(&reference, at, side, then))?;
                }
            }
        }
        for at in (1..=reference.appends_back).step_by(usize::try_from(self.stride).unwrap_or(1)) {
            for side in [Side::Before, Side::After] {
                let name = format!("a failure at the end, and death at append {at} ({side:?} it is durable)");
                case(name, self.dying_back(&reference, at, side))?;
            }
        }
        if self.inside_calls {
            for step in &reference.steps {
                for delay in INSIDE {
                    for then in [Then::Resume, Then::RollBack] {
                        let name = format!("death {delay:?} into `apply` of `{step}`, then {then:?}");
                        case(name, self.dying_inside(&reference, step, "apply", delay, then))?;
                    }
                    let name = format!("death {delay:?} into the undo of `{step}`");
                    case(name, self.dying_inside(&reference, step, "undo", delay, Then::Resume))?;
                }
            }
        }
        Ok(report)
    }

    /// Runs undisturbed, forward and back.
    fn reference(&self) -> Result<Reference, SweepFailure> {
        let wrong = |message: String| SweepFailure { case: "undisturbed".into(), message };
        let world = self.scenario.fresh();
        let before = self.scenario.observe(&world);
        let (journal, steps, appends) = self.count(&world, |pipeline| pipeline).map_err(wrong)?;
        self.expect(&journal, &world, "committed", |outcome| *outcome == Outcome::Committed, None).map_err(wrong)?;
        let after = self.scenario.observe(&world);
        if before == after {
            return Err(wrong("the upgrade changes nothing that can be observed".into()));
        }
        // A step that finds itself unchanged is never called again: nothing can go wrong with it.
        let prepared: Vec<_> = self.records(&journal).map_err(wrong)?;
        let prepared = |step: &StepId| {
            prepared.iter().any(|r| matches!(&r.entry, Entry::StepPrepared { step: id, .. } if id == step))
        };
        let steps: Vec<StepId> = steps.into_iter().filter(prepared).collect();
        let world = self.scenario.fresh();
        let (journal, _, appends_back) = self.count(&world, Pipeline::failing_at_the_end).map_err(wrong)?;
        self.expect(&journal, &world, "rolled back", is_rolled_back, Some(&before))
            .map_err(|message| SweepFailure { case: "a failure at the end".into(), message })?;
        Ok(Reference { before, after, appends, appends_back, steps })
    }

    fn count(
        &self,
        world: &S::World,
        adjust: impl FnOnce(Pipeline) -> Pipeline,
    ) -> Result<(MemoryJournal, Vec<StepId>, u64), String> {
        let journal = MemoryJournal::new();
        let dying = Arc::new(Dying::new(Arc::new(journal.clone()), 0, Side::Before, self.drops_undo()));
        let died = Notify::new();
        let steps = self.scene(world, |pipeline| {
            let pipeline = adjust(pipeline);
            let steps = pipeline.graph.order().to_vec();
            let (dying, died) = (dying.clone(), &died);
            async move {
                match self.drive(&pipeline, dying, died, None).await {
                    Driven::Ended(Ok(_)) => Ok(steps),
                    Driven::Ended(Err(error)) => {
                        Err(format!("{error}: {:?}", std::error::Error::source(&error).map(ToString::to_string)))
                    }
                    Driven::Died => Err("it died".into()),
                }
            }
        })??;
        let appends = dying.appends.load(std::sync::atomic::Ordering::SeqCst);
        Ok((journal, steps, appends))
    }

    fn failing_step(&self, reference: &Reference, step: &StepId, fault: Fault) -> Result<(), String> {
        let world = self.scenario.fresh();
        let journal = self.live(&world, |pipeline| pipeline.with_fault(step, fault))?;
        self.expect(&journal, &world, "rolled back", is_rolled_back, Some(&reference.before))
    }

    fn failing_undo(&self, reference: &Reference, step: &StepId, when: When) -> Result<(), String> {
        let world = self.scenario.fresh();
        let journal =
            self.live(&world, |pipeline| pipeline.failing_at_the_end().with_fault(step, Fault::Undo(when, 1)))?;
        self.expect(&journal, &world, "rolled back", is_rolled_back, Some(&reference.before))
    }

    fn failing_commit(&self, reference: &Reference, step: &StepId, when: When) -> Result<(), String> {
        let world = self.scenario.fresh();
        let journal = self.live(&world, |pipeline| pipeline.with_fault(step, Fault::Commit(when)))?;
        self.expect(&journal, &world, "committed", |outcome| *outcome == Outcome::Committed, Some(&reference.after))
    }

    /// Lets an undo fail until it is stuck, then lets the operator retry.
    fn stuck(&self, reference: &Reference, step: &StepId, when: When) -> Result<(), String> {
        let world = self.scenario.fresh();
        let journal = self.live(&world, |pipeline| {
            pipeline.failing_at_the_end().without_undo_retry().with_fault(step, Fault::Undo(when, 1))
        })?;
        if let Outcome::RolledBack { .. } = self.outcome(&journal)? {
            // The step was unchanged: there was nothing to undo.
            return self.expect(&journal, &world, "rolled back", is_rolled_back, Some(&reference.before));
        }
        let stuck = |outcome: &Outcome| matches!(outcome, Outcome::Stuck { steps, .. } if steps.iter().any(|(id, _)| id == step));
        self.expect(&journal, &world, "stuck at that step", stuck, None)?;
        let retry = Demand::Resolve { step: step.clone(), resolution: Resolution::Retry, reason: "a sweep".into() };
        self.take_up(&journal, &world, Pipeline::failing_at_the_end, retry)?;
        self.expect(&journal, &world, "rolled back", is_rolled_back, Some(&reference.before))
    }

    fn repeating(&self, reference: &Reference, step: &StepId) -> Result<(), String> {
        let world = self.scenario.fresh();
        let journal = self.live(&world, |pipeline| pipeline.with_fault(step, Fault::Repeat))?;
        self.expect(&journal, &world, "committed", |outcome| *outcome == Outcome::Committed, Some(&reference.after))?;
        let world = self.scenario.fresh();
        let journal = self.live(&world, |pipeline| pipeline.failing_at_the_end().with_fault(step, Fault::Repeat))?;
        self.expect(&journal, &world, "rolled back", is_rolled_back, Some(&reference.before))
    }

    /// Lets somebody else change what a step works on, just before a call on it.
    fn foreign(&self, reference: &Reference, step: &StepId, call: &str) -> Result<(), String> {
        let probe = self.scenario.fresh();
        if !self.scenario.interfere(&probe, step) {
            return Ok(());
        }
        drop(probe);
        let world = self.scenario.fresh();
        // The step's call waits until the change has been made from here.
        let (asked, asks) = std::sync::mpsc::channel::<std::sync::mpsc::Sender<()>>();
        let journal = MemoryJournal::new();
        let mut first = true;
        let waiting = call.to_owned();
        let changed = std::thread::scope(|scope| {
            let driven = scope.spawn({
                let journal = journal.clone();
                let pipeline_of = || self.scenario.pipeline(&world);
                // The pipeline is built here, on the scope's own thread: a world need not be shared.
                let pipeline = runtime().map(|runtime| {
                    let _guard = runtime.enter();
                    (pipeline_of().impatient().failing_at_the_end(), runtime)
                });
                let died = Notify::new();
                move || {
                    let (pipeline, runtime) = pipeline?;
                    let pipeline = pipeline.telling(step, move |name| {
                        if name == waiting && std::mem::take(&mut first) {
                            let (done, wait) = std::sync::mpsc::channel();
                            if asked.send(done).is_ok() {
                                let _ = wait.recv();
                            }
                        }
                    });
                    let journal: Arc<dyn Journal> = Arc::new(journal);
                    let driven = runtime.block_on(self.drive(
                        &pipeline,
                        Arc::new(Dying::new(journal, 0, Side::Before, self.drops_undo())),
                        &died,
                        None,
                    ));
                    runtime.shutdown_timeout(PATIENCE);
                    match driven {
                        Driven::Ended(Ok(_)) => Ok(()),
                        Driven::Ended(Err(error)) => Err(error.to_string()),
                        Driven::Died => Err("it died".to_owned()),
                    }
                }
            });
            let changed = match asks.recv() {
                Ok(done) => {
                    let changed = self.scenario.interfere(&world, step);
                    drop(done);
                    changed
                }
                // The step was never called so: it found itself unchanged.
                Err(_) => false,
            };
            driven.join().map_err(|_| "the driver panicked".to_owned()).and_then(|driven| driven).map(|()| changed)
        })?;
        if !changed {
            return self.expect(&journal, &world, "rolled back", is_rolled_back, Some(&reference.before));
        }
        if !self.scenario.survived(&world, step) {
            return Err("the foreign change was written over".into());
        }
        match self.outcome(&journal)? {
            Outcome::Stuck { steps, .. } => {
                let conflict =
                    |error: &Option<crate::error::StepError>| error.as_ref().is_some_and(|e| e.as_conflict().is_some());
                if !steps.iter().any(|(id, error)| id == step && conflict(error)) {
                    return Err(format!("it is stuck, but not with a conflict at `{step}`: {steps:?}"));
                }
                let skip =
                    Demand::Resolve { step: step.clone(), resolution: Resolution::Skip, reason: "a sweep".into() };
                self.take_up(&journal, &world, Pipeline::failing_at_the_end, skip)?;
                self.order(&journal, &world)
            }
            Outcome::RolledBack { .. } => self.order(&journal, &world),
            other => Err(format!("it should be stuck or rolled back, and is {other:?}")),
        }
    }

    fn dying(&self, reference: &Reference, at: u64, side: Side, then: Then) -> Result<(), String> {
        let world = self.scenario.fresh();
        let journal = MemoryJournal::new();
        self.die(&journal, &world, |pipeline| pipeline, at, side, None)?;
        self.finish(reference, &journal, &world, |pipeline| pipeline, then)
    }

    fn dying_back(&self, reference: &Reference, at: u64, side: Side) -> Result<(), String> {
        let world = self.scenario.fresh();
        let journal = MemoryJournal::new();
        self.die(&journal, &world, Pipeline::failing_at_the_end, at, side, None)?;
        self.finish(reference, &journal, &world, Pipeline::failing_at_the_end, Then::Resume)
    }

    fn dying_inside(
        &self,
        reference: &Reference,
        step: &StepId,
        call: &'static str,
        delay: Duration,
        then: Then,
    ) -> Result<(), String> {
        let world = self.scenario.fresh();
        let journal = MemoryJournal::new();
        let adjust = |pipeline: Pipeline| if call == "undo" { pipeline.failing_at_the_end() } else { pipeline };
        self.die(&journal, &world, adjust, 0, Side::Before, Some((step, call, delay)))?;
        self.finish(reference, &journal, &world, adjust, then)
    }

    /// Drives until the crash.
    fn die(
        &self,
        journal: &MemoryJournal,
        world: &S::World,
        adjust: impl Fn(Pipeline) -> Pipeline,
        at: u64,
        side: Side,
        inside: Option<(&StepId, &'static str, Duration)>,
    ) -> Result<(), String> {
        let dying = Arc::new(Dying::new(Arc::new(journal.clone()), at, side, self.drops_undo()));
        let died = dying.died.clone();
        self.scene(world, |pipeline| {
            let mut pipeline = adjust(pipeline);
            let begun = Arc::new(Notify::new());
            let mut delay_inside = None;
            if let Some((step, call, delay)) = inside {
                let tell = begun.clone();
                pipeline = pipeline.telling(step, move |name| {
                    if name == call {
                        tell.notify_one();
                    }
                });
                delay_inside = Some((begun, delay));
            }
            let died = died.clone();
            let dying = dying.clone();
            async move {
                // A step that is never called so lets the run end: there is nothing to die in.
                match self.drive(&pipeline, dying, &died, delay_inside).await {
                    Driven::Ended(Err(error)) => Err(error.to_string()),
                    Driven::Ended(Ok(_)) | Driven::Died => Ok(()),
                }
            }
        })?
    }

    /// Takes up what a crash left, and compares.
    fn finish(
        &self,
        reference: &Reference,
        journal: &MemoryJournal,
        world: &S::World,
        adjust: impl Fn(Pipeline) -> Pipeline,
        then: Then,
    ) -> Result<(), String> {
        let demand = match then {
            Then::Resume => Demand::Resume,
            Then::RollBack => Demand::Rollback { reason: "a sweep".into() },
        };
        if self.last_run(journal)?.is_none() {
            // The crash came before the run existed: it starts anew.
            self.live_on(journal, world, &adjust)?;
        } else {
            self.take_up(journal, world, &adjust, demand)?;
        }
        match self.outcome(journal)? {
            Outcome::Committed => {
                if then == Then::RollBack && !self.was_past_commit(journal)? && self.last_state_was_open(journal)? {
                    return Err("it should have rolled back, and is committed".into());
                }
                self.expect(
                    journal,
                    world,
                    "committed",
                    |outcome| *outcome == Outcome::Committed,
                    Some(&reference.after),
                )
            }
            _ => self.expect(
                journal,
                world,
                "rolled back",
                |o| is_rolled_back(o) || is_rejected(o),
                Some(&reference.before),
            ),
        }
    }

    /// Tells whether the run had entered its commit when it was taken up for the last time.
    fn was_past_commit(&self, journal: &MemoryJournal) -> Result<bool, String> {
        let records = self.records(journal)?;
        let last = records.iter().rposition(|r| matches!(r.entry, Entry::DriverAttached { .. })).unwrap_or(0);
        Ok(records[..last].iter().any(|r| matches!(&r.entry, Entry::RunEntered { state: RunState::Committing, .. })))
    }

    /// Tells whether the run was taken up more than once: there was something to roll back.
    fn last_state_was_open(&self, journal: &MemoryJournal) -> Result<bool, String> {
        Ok(self.records(journal)?.iter().filter(|r| matches!(r.entry, Entry::DriverAttached { .. })).count() > 1)
    }

    fn live(&self, world: &S::World, adjust: impl Fn(Pipeline) -> Pipeline) -> Result<MemoryJournal, String> {
        let journal = MemoryJournal::new();
        self.live_on(&journal, world, adjust)?;
        Ok(journal)
    }

    fn live_on(
        &self,
        journal: &MemoryJournal,
        world: &S::World,
        adjust: impl Fn(Pipeline) -> Pipeline,
    ) -> Result<(), String> {
        self.die(journal, world, adjust, 0, Side::Before, None)
    }

    /// Makes a demand of the last run; one that its state does not allow is followed by a resume.
    fn take_up(
        &self,
        journal: &MemoryJournal,
        world: &S::World,
        adjust: impl Fn(Pipeline) -> Pipeline,
        demand: Demand,
    ) -> Result<(), String> {
        let Some(run) = self.last_run(journal)? else { return Err("there is no run".into()) };
        let executor = self.executor(Arc::new(journal.clone()));
        self.scene(world, |pipeline| {
            let pipeline = adjust(pipeline);
            let options = RunOptions { patience: Duration::from_secs(10), ..RunOptions::default() };
            async move {
                let interrupt = Interrupt::new();
                let asked = executor.demand(&pipeline, &run, demand, &options, &interrupt);
                match tokio::time::timeout(PATIENCE, asked).await {
                    Err(_) => Err("it hangs".to_owned()),
                    Ok(Ok(Answer::Driven(_))) => Ok(()),
                    Ok(Ok(Answer::Refused { .. })) => {
                        let resumed = executor.resume(&pipeline, &run, &options, &interrupt).await;
                        resumed.map(drop).map_err(|error| error.to_string())
                    }
                    Ok(Ok(Answer::Granted)) => Err("somebody still drives it".to_owned()),
                    Ok(Err(error)) => Err(error.to_string()),
                }
            }
        })?
    }

    /// Gives one driver a runtime and a pipeline of its own; when it returns, nothing of it runs.
    fn scene<T, F>(&self, world: &S::World, drive: impl FnOnce(Pipeline) -> F) -> Result<T, String>
    where
        F: Future<Output = T>,
    {
        let runtime = runtime()?;
        let pipeline = {
            let _guard = runtime.enter();
            self.scenario.pipeline(world).impatient()
        };
        let result = runtime.block_on(async { drive(pipeline).await });
        // A crash ends a process's threads; here they are awaited, so that nothing outlives it.
        runtime.shutdown_timeout(PATIENCE);
        Ok(result)
    }

    async fn drive(
        &self,
        pipeline: &Pipeline,
        journal: Arc<Dying>,
        died: &Notify,
        inside: Option<(Arc<Notify>, Duration)>,
    ) -> Driven {
        let executor = self.executor(journal);
        let (options, interrupt) = (RunOptions::default(), Interrupt::new());
        let inside = async {
            match inside {
                Some((begun, delay)) => {
                    begun.notified().await;
                    tokio::time::sleep(delay).await;
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ended = tokio::time::timeout(PATIENCE, executor.run(pipeline, &options, &interrupt)) => match ended {
                Ok(result) => Driven::Ended(result.map(Box::new)),
                Err(_) => Driven::Ended(Err(ExecutorError::Refused { message: "it hangs".into(), hint: None })),
            },
            () = died.notified() => Driven::Died,
            () = inside => Driven::Died,
        }
    }

    fn executor(&self, journal: Arc<dyn Journal>) -> Executor {
        let executor = Executor::new(journal);
        match self.mutation {
            Some(mutation) => executor.with_decide(mutation.decide()),
            None => executor,
        }
    }

    fn drops_undo(&self) -> bool {
        self.mutation == Some(Mutation::DropUndoRecord)
    }

    fn last_run(&self, journal: &MemoryJournal) -> Result<Option<RunId>, String> {
        let runs = runtime()?.block_on(journal.runs()).map_err(|error| error.to_string())?;
        Ok(runs.last().map(|run| run.run.clone()))
    }

    fn records(&self, journal: &MemoryJournal) -> Result<Vec<crate::entry::Record>, String> {
        let run = self.last_run(journal)?.ok_or("there is no run")?;
        runtime()?.block_on(journal.load(&run)).map_err(|error| error.to_string())
    }

    fn outcome(&self, journal: &MemoryJournal) -> Result<Outcome, String> {
        let run = crate::executor::state::Run::replay(self.records(journal)?).map_err(|error| error.to_string())?;
        Ok(crate::executor::outcome_of(&run))
    }

    fn order(&self, journal: &MemoryJournal, world: &S::World) -> Result<(), String> {
        let graph = self.scene(world, |pipeline| async move { pipeline.graph })?;
        let wrong = order_violations(&graph, &self.records(journal)?);
        if wrong.is_empty() { Ok(()) } else { Err(wrong.join("; ")) }
    }

    fn expect(
        &self,
        journal: &MemoryJournal,
        world: &S::World,
        expected: &str,
        holds: impl Fn(&Outcome) -> bool,
        seen: Option<&str>,
    ) -> Result<(), String> {
        let outcome = self.outcome(journal)?;
        if !holds(&outcome) {
            return Err(format!("it should be {expected}, and is {outcome:?}"));
        }
        let observed = self.scenario.observe(world);
        if let Some(seen) = seen.filter(|seen| **seen != observed) {
            return Err(format!("it is {expected}, and the world is\n{observed}\nwhere it should be\n{seen}"));
        }
        self.order(journal, world)
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, String> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())
}

fn is_rolled_back(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::RolledBack { health: Health::Restored, .. })
}

fn is_rejected(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Rejected { .. })
}
