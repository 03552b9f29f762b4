//! One call on a step or a check: bounded in time, cancellable, never left running unseen.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use super::clock::Clock;
use super::decide::Call;
use super::observers::Observers;
use super::state::{Run, StepRun};
use crate::context::{Backend, Baseline, Context, Direction, LEASE, Parts, Progress};
use crate::entry::{Phase, Versioned};
use crate::erased::{AnyPrepared, AnyStep};
use crate::error::{CheckError, StepError};
use crate::journal::Lease;
use crate::names::{CheckId, LockName, StepId};
use crate::pipeline::{CheckNode, Pipeline, StepNode};
use crate::sealed::SealedStorage;
use crate::secret::Secrets;
use crate::transition::StepState;
use crate::units::Span;
use crate::verdict::{Status, Verdict};

/// How long a pre-check that is asked again after a rollback may take to pass, at least.
const RECOVERY: Span = Span::from_secs(10);

/// How many unknown verdicts in a row are taken for an answer.
const UNKNOWN_IN_A_ROW: u32 = 3;

/// How long is waited between two unknown verdicts of a check that names no interval shorter.
const UNKNOWN_PAUSE: Duration = Duration::from_millis(500);

/// Says how a call ended.
#[derive(Debug)]
pub(crate) enum Ended {
    Checked(Verdict),
    Prepared(Result<AnyPrepared, StepError>),
    Skipped(String),
    Applied(Result<Versioned, StepError>),
    Undone(Result<(), StepError>),
    Committed(Result<(), StepError>),
    /// It did not return after its cancellation.
    Unresponsive(Direction),
}

/// Carries a checkpoint to the driver, and back whether it is durable.
pub(crate) struct Checkpoint {
    pub(crate) step: StepId,
    pub(crate) direction: Direction,
    pub(crate) value: Versioned,
    pub(crate) durable: oneshot::Sender<()>,
}

/// Holds what every call of a run has in common.
#[derive(Clone)]
pub(crate) struct Caller {
    pub(crate) pipeline: Arc<Pipeline>,
    pub(crate) secrets: Secrets,
    pub(crate) sealed: Arc<dyn SealedStorage>,
    pub(crate) observers: Arc<Observers>,
    pub(crate) checkpoints: mpsc::UnboundedSender<Checkpoint>,
    /// Held by every call as well, so that no other driver starts while one is still running.
    pub(crate) lease: Option<Arc<Lease>>,
    pub(crate) clock: Clock,
    pub(crate) dry_run: bool,
}

struct Connection {
    step: Option<(StepId, String, u32)>,
    direction: Direction,
    observers: Arc<Observers>,
    checkpoints: mpsc::UnboundedSender<Checkpoint>,
    secrets: Secrets,
}

#[async_trait]
impl Backend for Connection {
    async fn checkpoint(&self, value: Value) -> Result<(), StepError> {
        let halted = || StepError::unknown("the journal did not take the checkpoint: the run has halted");
        let Some((step, kind, format)) = self.step.clone() else {
            return Err(StepError::permanent("a check cannot make checkpoints"));
        };
        if self.secrets.are_in(&value) {
            return Err(StepError::permanent(format!("step `{step}` would write a secret into a checkpoint")));
        }
        let (durable, written) = oneshot::channel();
        let value = Versioned { kind, format, value };
        let direction = self.direction;
        self.checkpoints.send(Checkpoint { step, direction, value, durable }).map_err(|_| halted())?;
        written.await.map_err(|_| halted())
    }

    fn progress(&self, progress: Progress) {
        self.observers.progress(progress);
    }
}

/// Names who is called, for a context.
struct Subject<'a> {
    id: &'a str,
    kind: &'a str,
    direction: Direction,
    step: Option<(&'a StepNode, &'a AnyStep)>,
    is_baseline: bool,
}

impl Caller {
    fn context(
        &self,
        run: &Run,
        subject: &Subject<'_>,
        cancelled: &CancellationToken,
        deadline: Option<Instant>,
    ) -> Result<Context, StepError> {
        let step_run = subject.step.and_then(|(node, _)| run.steps.get(&node.id));
        let connection = Connection {
            step: subject.step.map(|(node, step)| (node.id.clone(), subject.kind.to_owned(), step.erased().format())),
            direction: subject.direction,
            observers: self.observers.clone(),
            checkpoints: self.checkpoints.clone(),
            secrets: self.secrets.clone(),
        };
        let baseline = match (&subject.step, CheckId::try_from(subject.id)) {
            (None, Ok(id)) => run.baselines.get(&id).cloned().unwrap_or_default(),
            _ => Baseline::default(),
        };
        Ok(Context::new(Parts {
            run: run.id().clone(),
            subject: subject.id.to_owned(),
            kind: subject.kind.to_owned(),
            direction: subject.direction,
            attempt: step_run.map_or(0, |step| step.tries) + 1,
            interrupted: step_run.is_some_and(|step| step.interrupted),
            dry_run: self.dry_run,
            cancelled: cancelled.clone(),
            deadline,
            on_conflict: subject.step.map(|(node, _)| node.policy.on_conflict).unwrap_or_default(),
            environment: self.pipeline.environment.clone(),
            from: run.header().from.clone(),
            to: self.pipeline.to.clone(),
            outputs: run.outputs().clone(),
            baseline,
            is_baseline: subject.is_baseline,
            checkpoint: match subject.step {
                Some((_, step)) => readable_checkpoint(step, step_run, subject.direction)?,
                None => None,
            },
            secrets: self.secrets.clone(),
            sealed: self.sealed.clone(),
            backend: Arc::new(connection),
        }))
    }

    /// Makes a context for something that is neither a step nor one of the pipeline's checks.
    pub(crate) fn plain_context(&self, run: &Run, id: &str, kind: &str) -> Result<Context, StepError> {
        let subject = Subject { id, kind, direction: Direction::Forward, step: None, is_baseline: false };
        self.context(run, &subject, &CancellationToken::new(), None)
    }

    /// Prepares a call: the future owns all that it needs.
    pub(crate) fn call(
        &self,
        call: &Call,
        run: &Run,
        cancelled: &CancellationToken,
        budget_end: Option<Timestamp>,
    ) -> Result<impl Future<Output = Ended> + Send + 'static, StepError> {
        let work = match call {
            Call::Check(phase, id) => self.check_work(phase, id, run, cancelled)?,
            Call::Prepare(id) => self.step_work(id, Direction::Forward, run, cancelled, budget_end, |work| {
                Box::pin(async move {
                    let ended = work.step.erased().prepare(&work.cx).await;
                    Ended::Prepared(ended)
                })
            })?,
            Call::Apply(id) => self.step_work(id, Direction::Forward, run, cancelled, budget_end, |work| {
                Box::pin(async move {
                    let ended = async {
                        let undo = work.undo()?;
                        if work.after_trouble {
                            work.step.erased().settle(&work.cx, undo).await?;
                        }
                        work.step.erased().apply(&work.cx, undo).await
                    };
                    Ended::Applied(ended.await)
                })
            })?,
            Call::Undo(id) => self.step_work(id, Direction::Back, run, cancelled, None, |work| {
                Box::pin(async move {
                    let ended = async {
                        let undo = work.undo()?;
                        work.step.erased().settle(&work.cx, undo).await?;
                        work.step.erased().rollback(&work.cx, undo, work.output.as_ref()).await
                    };
                    Ended::Undone(ended.await)
                })
            })?,
            Call::Commit(id) => self.step_work(id, Direction::Commit, run, cancelled, None, |work| {
                Box::pin(async move {
                    let ended = async { work.step.erased().commit(&work.cx, work.undo()?).await };
                    Ended::Committed(ended.await)
                })
            })?,
        };
        let lease = self.lease.clone();
        Ok(async move {
            match lease {
                Some(lease) => LEASE.scope(lease, work).await,
                None => work.await,
            }
        })
    }

    fn step_work(
        &self,
        id: &StepId,
        direction: Direction,
        run: &Run,
        cancelled: &CancellationToken,
        budget_end: Option<Timestamp>,
        work: impl FnOnce(Work) -> Pending,
    ) -> Result<Pending, StepError> {
        let node =
            self.pipeline.step(id).ok_or_else(|| StepError::permanent(format!("the pipeline has no step `{id}`")))?;
        let outputs = run.outputs();
        if let Some(when) = node.when.as_ref().filter(|_| run.step_state(id) == StepState::Pending)
            && !(when.holds)(outputs)?
        {
            let reason = format!("`{}` does not hold", when.text);
            return Ok(Box::pin(async move { Ended::Skipped(reason) }));
        }
        let step = node.build(outputs)?;
        if run.step_state(id) == StepState::Pending {
            self.only_what_is_locked(id, &step)?;
        }
        let timeout = if direction == Direction::Forward { node.policy.timeout } else { node.policy.undo_timeout };
        let left = budget_end.map_or(timeout.0, |end| self.clock.until(end).min(timeout.0));
        let deadline = Instant::now() + left;
        let subject =
            Subject { id: id.as_str(), kind: node.kind(), direction, step: Some((node, &step)), is_baseline: false };
        let cx = self.context(run, &subject, cancelled, Some(deadline))?;
        let step_run = run.steps.get(id);
        let work = work(Work {
            id: id.clone(),
            cx,
            step: step.clone(),
            undo: step_run.and_then(|step| step.undo.clone()),
            output: step_run.and_then(|step| step.output.clone()),
            after_trouble: step_run.is_some_and(|step| step.interrupted || step.tries > 0),
        });
        Ok(Box::pin(bounded(work, cancelled.clone(), deadline, timeout, node.policy.grace.0, direction)))
    }

    /// Refuses a step that turns out to change what the run has not locked.
    fn only_what_is_locked(&self, id: &StepId, step: &AnyStep) -> Result<(), StepError> {
        let Some(lease) = &self.lease else { return Ok(()) };
        let locked = |lock: &LockName| lease.locks().iter().any(|held| held.covers(lock));
        match step.erased().targets().iter().map(|target| target.lock()).find(|lock| !locked(lock)) {
            None => Ok(()),
            Some(lock) => {
                Err(StepError::permanent(format!("step `{id}` changes {lock}, which the run has not locked"))
                    .with_hint(
                        "this was known only now: name it under `targets:`, so that no other run changes it meanwhile",
                    ))
            }
        }
    }

    fn check_work(
        &self,
        phase: &Phase,
        id: &CheckId,
        run: &Run,
        cancelled: &CancellationToken,
    ) -> Result<Pending, StepError> {
        let mut node = self
            .find_check(phase, id)
            .ok_or_else(|| StepError::permanent(format!("the pipeline has no {phase} `{id}`")))?
            .clone();
        // Written for a service that runs; what the undo has just started may not answer yet.
        if *phase == Phase::RollbackVerify && self.pipeline.rollback_verify.is_none() {
            node.policy.within = node.policy.within.max(RECOVERY);
        }
        let ask = Ask::new(self, node, phase, run, cancelled)?;
        Ok(Box::pin(async move { Ended::Checked(ask.until_answered().await) }))
    }

    fn find_check(&self, phase: &Phase, id: &CheckId) -> Option<&CheckNode> {
        let pipeline = &self.pipeline;
        let named = |nodes: &'_ [CheckNode]| nodes.iter().position(|node| node.id == *id);
        match phase {
            Phase::Pre => named(&pipeline.checks).map(|at| &pipeline.checks[at]),
            Phase::Verify => named(&pipeline.verify).map(|at| &pipeline.verify[at]),
            Phase::RollbackVerify => named(pipeline.rollback_checks()).map(|at| &pipeline.rollback_checks()[at]),
            Phase::Before(step) => pipeline.step(step)?.before.iter().find(|node| node.id == *id),
            Phase::After(step) => pipeline.step(step)?.after.iter().find(|node| node.id == *id),
            Phase::Guard => pipeline.guards.iter().map(|guard| &guard.check).find(|node| node.id == *id),
            Phase::Baseline => pipeline.baseline_checks().into_iter().find(|node| node.id == *id),
            Phase::Pivot => pipeline.pivot_checks().into_iter().find(|(name, _)| name == id).map(|(_, node)| node),
        }
    }
}

type Pending = std::pin::Pin<Box<dyn Future<Output = Ended> + Send>>;

struct Work {
    id: StepId,
    cx: Context,
    step: AnyStep,
    undo: Option<Versioned>,
    output: Option<Versioned>,
    after_trouble: bool,
}

impl Work {
    fn undo(&self) -> Result<&Versioned, StepError> {
        self.undo.as_ref().ok_or_else(|| {
            StepError::permanent(format!("the journal holds no undo record of step `{}`", self.id))
                .with_hint("nothing is undone on a guess: put the step back by hand and resolve it with --skip")
        })
    }
}

fn readable_checkpoint(
    step: &AnyStep,
    run: Option<&StepRun>,
    direction: Direction,
) -> Result<Option<Value>, StepError> {
    let Some(checkpoint) = run.and_then(|run| run.checkpoints.get(&direction)) else { return Ok(None) };
    let format = step.erased().format();
    if checkpoint.format != format {
        return Err(StepError::permanent(format!(
            "the checkpoint of `{}` has format {}; this program writes {format}",
            checkpoint.kind, checkpoint.format
        ))
        .with_hint("go on with the version of the program that made the checkpoint"));
    }
    Ok(Some(checkpoint.value.clone()))
}

/// Awaits a call; past its deadline or on a cancellation, signals it and awaits its return.
async fn bounded(
    mut work: Pending,
    cancelled: CancellationToken,
    deadline: Instant,
    timeout: Span,
    grace: Duration,
    direction: Direction,
) -> Ended {
    let timed_out = tokio::select! {
        biased;
        ended = &mut work => return ended,
        () = cancelled.cancelled() => false,
        () = sleep_until(deadline) => true,
    };
    cancelled.cancel();
    let Ok(ended) = timeout_at(Instant::now() + grace, &mut work).await else {
        return Ended::Unresponsive(direction);
    };
    if !timed_out {
        return ended;
    }
    let too_long = StepError::permanent(format!("it took longer than its time, {timeout}"))
        .with_hint("raise `timeout` (or `undo_timeout`, or the budget) if the step was still making progress");
    match ended {
        Ended::Prepared(_) => Ended::Prepared(Err(too_long)),
        Ended::Applied(_) => Ended::Applied(Err(too_long)),
        // What is back, or committed, is so however long it took.
        done @ (Ended::Undone(Ok(())) | Ended::Committed(Ok(()))) => done,
        Ended::Undone(_) => Ended::Undone(Err(too_long)),
        Ended::Committed(_) => Ended::Committed(Err(too_long)),
        other => other,
    }
}

/// Asks one check, again and again as its policy says.
pub(crate) struct Ask {
    node: CheckNode,
    cx: Context,
    baseline: BTreeMap<String, f64>,
    cancelled: CancellationToken,
    secrets: Secrets,
}

impl Ask {
    pub(crate) fn new(
        caller: &Caller,
        mut node: CheckNode,
        phase: &Phase,
        run: &Run,
        cancelled: &CancellationToken,
    ) -> Result<Self, StepError> {
        let subject = Subject {
            id: node.id.as_str(),
            kind: node.check.kind(),
            direction: if *phase == Phase::RollbackVerify { Direction::Back } else { Direction::Forward },
            step: None,
            is_baseline: matches!(phase, Phase::Pre | Phase::Baseline),
        };
        let cx = caller.context(run, &subject, cancelled, None)?;
        let baseline = run.baselines.get(&node.id).cloned().unwrap_or_default().figures;
        // Before the run there is nothing to compare with: the figures measured now are the baseline.
        if subject.is_baseline {
            node.policy.limits.retain(|_, limit| !limit.is_relative());
        }
        Ok(Self { node, cx, baseline, cancelled: cancelled.clone(), secrets: caller.secrets.clone() })
    }

    /// Asks once; an overrun or an error is *unknown*.
    pub(crate) async fn once(&self) -> Verdict {
        let timeout = self.node.policy.timeout;
        let answer = tokio::select! {
            answer = self.node.check.check(&self.cx) => answer,
            () = sleep(timeout.0) => {
                Err(CheckError::unknown(format!("no answer within {timeout}"))
                    .with_hint("raise the check's `timeout`, or look at what it asks"))
            }
            () = self.cancelled.cancelled() => Err(CheckError::unknown("the check was cancelled")),
        };
        let verdict = match answer {
            Ok(verdict) => verdict.held_to(&self.node.policy.limits, &self.baseline),
            Err(error) => {
                let mut message = error.message().to_owned();
                for cause in error.causes() {
                    message = format!("{message}: {cause}");
                }
                let verdict = Verdict::unknown(message);
                match error.hint() {
                    Some(hint) => verdict.with_hint(hint),
                    None => verdict,
                }
            }
        };
        masked(verdict, &self.secrets)
    }

    async fn until_answered(&self) -> Verdict {
        let policy = &self.node.policy;
        let end = Instant::now() + policy.within.0;
        let mut unknown = 0;
        loop {
            let verdict = self.once().await;
            unknown = if verdict.status == Status::Unknown { unknown + 1 } else { 0 };
            let now = Instant::now();
            let again = match verdict.status {
                Status::Pass | Status::Warn => false,
                Status::Fail => now < end,
                Status::Unknown => now < end || unknown < UNKNOWN_IN_A_ROW,
            };
            if !again || self.cancelled.is_cancelled() {
                return verdict;
            }
            let pause = if now < end { policy.every.0 } else { policy.every.0.min(UNKNOWN_PAUSE) };
            tokio::select! {
                () = sleep(pause) => {}
                () = self.cancelled.cancelled() => return verdict,
            }
        }
    }
}

fn masked(mut verdict: Verdict, secrets: &Secrets) -> Verdict {
    verdict.message = secrets.mask(&verdict.message);
    verdict.hint = verdict.hint.map(|hint| secrets.mask(&hint));
    for fact in verdict.facts.values_mut() {
        *fact = secrets.mask(fact);
    }
    verdict
}
