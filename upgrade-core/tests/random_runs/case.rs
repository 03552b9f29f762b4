//! One random run, lived through to its end, and what must be true then.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use upgrade_core::AnyStep;
use upgrade_core::context::Direction;
use upgrade_core::entry::{Demand, Entry, GuardAction, Record, Resolution};
use upgrade_core::executor::state::Run;
use upgrade_core::executor::{Answer, Executor, ExecutorError, Interrupt, Outcome, Report, RunOptions};
use upgrade_core::journal::Journal;
use upgrade_core::names::{RunId, StepId};
use upgrade_core::pipeline::{CommitMode, GuardOptions, Pipeline, Retry};
use upgrade_core::testkit::order_violations;
use upgrade_core::transition::RunState;
use upgrade_core::units::Span;

use crate::faulty::{End, Faulty};
use crate::world::{Alarm, Fault, Move, Plan, Reads, Trouble, World};

/// How often a run is taken up before the case counts as one that never ends.
const ROUNDS: usize = 60;

/// How long, in the run's own time, one driver may take.
const HUNG: Duration = Duration::from_secs(3600);

/// SplitMix64: small, and the same everywhere.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn of<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize]
    }
}

fn plans(random: &mut Random) -> Vec<Plan> {
    let count = 1 + random.below(12) as usize;
    let linear = random.one_in(4);
    let calm = random.one_in(5);
    let plan = |at: usize, random: &mut Random| {
        let needs = match linear {
            true => at.checked_sub(1).into_iter().collect(),
            false => (0..at).filter(|_| random.one_in(3)).collect(),
        };
        let mut faults = Vec::new();
        for call in ["prepare", "apply", "rollback", "commit"] {
            if !calm && random.one_in(if call == "rollback" { 5 } else { 10 }) {
                let trouble = match random.below(10) {
                    0..4 => Trouble::Transient,
                    4..8 => Trouble::Permanent,
                    8 => Trouble::Panic,
                    _ => Trouble::Hang,
                };
                let after = random.of(&[Reads::Found, Reads::Partial, Reads::Intended]);
                faults.push(Fault { call, trouble, times: 1 + random.below(5) as u32, after });
            }
        }
        Plan {
            needs,
            irreversible: random.one_in(10),
            unchanged: random.one_in(8),
            duration_ms: random.below(400),
            faults,
        }
    };
    (0..count).map(|at| plan(at, random)).collect()
}

fn name(at: usize) -> String {
    format!("s{at}")
}

fn pipeline(world: &Arc<World>, commit: CommitMode, action: GuardAction) -> Pipeline {
    let mut builder = Pipeline::builder("random").max_parallel(world.max_parallel).commit(commit);
    for (at, plan) in world.plans.iter().enumerate() {
        let step = Move { world: world.clone(), at };
        let any = match plan.irreversible {
            true => AnyStep::irreversible(step, "seeded"),
            false => AnyStep::reversible(step),
        };
        builder = builder.any_step(name(at), any, |options| {
            let retry = Retry { attempts: 3, delay: Span::from_millis(50), max_delay: Span::from_millis(100) };
            options
                .needs(plan.needs.iter().map(|at| name(*at)))
                .timeout(Span::from_secs(5))
                .undo_timeout(Span::from_secs(5))
                .grace(Span::from_secs(1))
                .retry(retry)
                .undo_retry(retry)
        });
    }
    let guard = GuardOptions::default().every(Span::from_millis(100)).action(action);
    builder.guard_with("alarm", Alarm(world.clone()), guard).build().unwrap()
}

/// What happens beside a driver.
#[derive(Debug, Clone, Copy)]
enum Beside {
    Nothing,
    Stop,
    Cancel,
    Breach,
    Demand(u8),
}

fn demand(which: u8) -> Demand {
    let reason = "seeded".to_owned();
    match which {
        0 => Demand::Stop { reason },
        1 => Demand::Rollback { reason },
        2 => Demand::Confirm { reason },
        _ => Demand::Resume,
    }
}

fn name_of(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Committed => "committed",
        Outcome::RolledBack { .. } => "rolled back",
        Outcome::Rejected { .. } => "rejected",
        Outcome::Abandoned { .. } => "abandoned",
        _ => "open",
    }
}

struct Case {
    random: Random,
    world: Arc<World>,
    pipeline: Pipeline,
}

/// Lives through the run of one seed.
pub(crate) fn live(seed: u64) -> Result<&'static str, String> {
    let mut random = Random(seed);
    let plans = plans(&mut random);
    let world = World::new(plans, 1 + random.below(4) as usize);
    let span = Span::from_millis(random.below(2000));
    let commit = random.of(&[CommitMode::Now, CommitMode::After(span), CommitMode::ConfirmWithin(span)]);
    let action = random.of(&[GuardAction::Rollback, GuardAction::Hold, GuardAction::Warn]);
    let pipeline = pipeline(&world, commit, action);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let mut case = Case { random, world, pipeline };
    runtime.block_on(async {
        let outcome = Box::pin(case.drive_to_the_end()).await?;
        case.judge(&outcome).await.map(|()| name_of(&outcome))
    })
}

impl Case {
    async fn run_id(&self) -> Option<RunId> {
        self.world.journal.runs().await.unwrap().last().map(|run| run.run.clone())
    }

    async fn drive_to_the_end(&mut self) -> Result<Outcome, String> {
        let mut next: Option<Demand> = None;
        for round in 0..ROUNDS {
            // Later rounds are left in peace, so that every case comes to an end.
            let peace = round > 8;
            let outcome = match Box::pin(self.drive(next.take(), peace)).await? {
                Some(report) => report.outcome,
                None => {
                    next = Some(match self.stuck_step().await {
                        Some(step) => self.resolve(&step),
                        None => demand(if peace { 3 } else { self.random.of(&[3, 3, 1, 0]) }),
                    });
                    continue;
                }
            };
            next = match outcome {
                Outcome::Held { state: RunState::Probation, .. } => Some(demand(self.random.of(&[2, 2, 1, 3]))),
                Outcome::Held { .. } => Some(demand(if peace { 3 } else { self.random.of(&[1, 3]) })),
                Outcome::Probation { .. } => Some(demand(self.random.of(&[1, 2, 3]))),
                Outcome::Stuck { steps, .. } => Some(self.resolve(&steps[0].0)),
                over => return Ok(over),
            };
        }
        let records = self.world.journal.load(&self.run_id().await.unwrap()).await.unwrap();
        Err(format!("it never ends\n{}", self.shown(&records)))
    }

    fn shown(&self, records: &[Record]) -> String {
        let entries: Vec<String> = records.iter().map(|record| format!("{} {:?}", record.seq, record.entry)).collect();
        format!("{}\n{:#?}", entries.join("\n"), self.world.plans)
    }

    async fn stuck_step(&self) -> Option<StepId> {
        let records = self.world.journal.load(&self.run_id().await?).await.unwrap();
        let run = Run::replay(&records).unwrap();
        (run.state() == RunState::Stuck).then(|| run.stuck_steps()[0].0.clone())
    }

    fn resolve(&mut self, step: &StepId) -> Demand {
        let at: usize = step.as_str()[1..].parse().unwrap();
        let resolution = self.random.of(&[Resolution::Retry, Resolution::Retry, Resolution::Skip, Resolution::Abandon]);
        let mut cells = self.world.cells();
        match resolution {
            Resolution::Retry => {}
            Resolution::Skip => (cells[at].reads, cells[at].resolved) = (Reads::Found, true),
            Resolution::Abandon => cells[at].resolved = true,
        }
        Demand::Resolve { step: step.clone(), resolution, reason: "seeded".into() }
    }

    /// Drives once; nothing if the driver died or its journal failed.
    async fn drive(&mut self, next: Option<Demand>, peace: bool) -> Result<Option<Report>, String> {
        self.world.breached.store(false, Ordering::SeqCst);
        let end = if peace { End::Never } else { self.random.of(&[End::Never, End::Death, End::Failure]) };
        let durable = self.random.one_in(2);
        let faulty = Arc::new(Faulty::new(self.world.journal.clone(), end, 1 + self.random.below(30), durable));
        let beside = match peace {
            true => Beside::Nothing,
            false => self.random.of(&[
                Beside::Nothing,
                Beside::Nothing,
                Beside::Nothing,
                Beside::Stop,
                Beside::Cancel,
                Beside::Breach,
                Beside::Demand(0),
                Beside::Demand(1),
                Beside::Demand(2),
            ]),
        };
        let delay = Duration::from_millis(self.random.below(3000));
        let options = RunOptions { patience: Duration::from_secs(5), detach: self.random.one_in(4), adopt: false };
        let executor = Executor::new(faulty.clone());
        let interrupt = Interrupt::new();
        let run = self.run_id().await;
        let main = async {
            match (&run, next) {
                (None, _) => executor.run(&self.pipeline, &options, &interrupt).await.map(Some),
                (Some(run), None | Some(Demand::Resume)) => {
                    executor.resume(&self.pipeline, run, &options, &interrupt).await.map(Some)
                }
                (Some(run), Some(demand)) => {
                    match executor.demand(&self.pipeline, run, demand, &options, &interrupt).await? {
                        Answer::Driven(report) => Ok(Some(report)),
                        Answer::Granted | Answer::Refused { .. } => Ok(None),
                    }
                }
            }
        };
        let side = async {
            tokio::time::sleep(delay).await;
            match beside {
                Beside::Nothing => {}
                Beside::Stop => interrupt.stop(),
                Beside::Cancel => interrupt.cancel(),
                Beside::Breach => self.world.breached.store(true, Ordering::SeqCst),
                Beside::Demand(which) => {
                    let (Some(run), other) = (self.run_id().await, Executor::new(faulty.clone())) else { return };
                    // Whatever the answer: what it did shows in the journal.
                    let _ = other.demand(&self.pipeline, &run, demand(which), &options, &Interrupt::new()).await;
                }
            }
        };
        let watch = async {
            faulty.died.notified().await;
            let begun = self.world.begun.load(Ordering::SeqCst);
            // Long enough for every call that was under way to return.
            tokio::time::sleep(Duration::from_secs(60)).await;
            begun
        };
        let both = async { tokio::join!(main, side).0 };
        let result = tokio::select! {
            biased;
            result = both => result,
            () = faulty.died.notified(), if end == End::Death => Ok(None),
            begun = watch, if end == End::Failure => {
                if begun != self.world.begun.load(Ordering::SeqCst) {
                    self.world.wrong("a call was begun after the journal had failed".into());
                }
                Ok(None)
            }
            () = tokio::time::sleep(HUNG) => return Err("it hangs".into()),
        };
        // What a crash aborts ends when the runtime comes by.
        for _ in 0..32 {
            tokio::task::yield_now().await;
        }
        match result {
            Ok(report) => Ok(report),
            Err(ExecutorError::Journal(_)) => Ok(None),
            // A demand that the state of the run does not allow: go on with it.
            Err(ExecutorError::Refused { .. }) => Ok(None),
            Err(error) => Err(format!("{error}: {error:?}")),
        }
    }

    async fn judge(&self, outcome: &Outcome) -> Result<(), String> {
        let mut wrong = std::mem::take(&mut *self.world.wrong.lock().unwrap());
        let records = match self.run_id().await {
            Some(run) => self.world.journal.load(&run).await.unwrap(),
            None => Vec::new(),
        };
        wrong.extend(order_violations(self.pipeline.graph(), &records));
        wrong.extend(lost_demands(&self.world, &records));
        let abandoned: BTreeSet<&str> = match outcome {
            Outcome::Abandoned { steps } => steps.iter().map(StepId::as_str).collect(),
            _ => BTreeSet::new(),
        };
        for (at, (cell, plan)) in self.world.cells().iter().zip(&self.world.plans).enumerate() {
            let expected = match outcome {
                _ if plan.unchanged || *outcome == Outcome::Committed => Reads::Intended,
                _ if abandoned.contains(name(at).as_str()) => continue,
                _ => Reads::Found,
            };
            if cell.reads != expected {
                wrong.push(format!("s{at} reads {:?} and should read {expected:?}", cell.reads));
            }
            if cell.committed != (*outcome == Outcome::Committed && !plan.unchanged) {
                wrong.push(format!("s{at}: committed is {}", cell.committed));
            }
        }
        if wrong.is_empty() {
            return Ok(());
        }
        Err(format!("{}\noutcome {outcome:?}\n{}", wrong.join("\n"), self.shown(&records)))
    }
}

/// Lists failures and granted rollbacks after which the run was committed all the same.
fn lost_demands(world: &World, records: &[Record]) -> Vec<String> {
    let state = |record: &Record, wanted| matches!(&record.entry, Entry::RunEntered { state, .. } if *state == wanted);
    if !records.iter().any(|record| state(record, RunState::Committing)) {
        return Vec::new();
    }
    let irreversible = |step: &StepId| world.plans[step.as_str()[1..].parse::<usize>().unwrap()].irreversible;
    let pivot = records
        .iter()
        .position(|record| matches!(&record.entry, Entry::StepPrepared { step, .. } if irreversible(step)))
        .unwrap_or(records.len());
    let mut wrong = Vec::new();
    for (at, record) in records[..pivot].iter().enumerate() {
        // Past a hold an operator chose to go on.
        let held = records[at..].iter().any(|record| state(record, RunState::Held));
        let turns_back = match &record.entry {
            Entry::StepFailed { direction: Direction::Forward, retry_at: None, .. } => true,
            Entry::RequestAnswered { id, refused: None } => records.iter().any(|record| {
                matches!(&record.entry, Entry::RequestReceived { request }
                    if request.id == *id && matches!(request.demand, Demand::Rollback { .. }))
            }),
            Entry::GuardChanged { breached: true, action: GuardAction::Rollback, .. } => true,
            _ => false,
        };
        if turns_back && !held {
            wrong.push(format!("entry {} should have turned the run back: {:?}", record.seq, record.entry));
        }
    }
    wrong
}
