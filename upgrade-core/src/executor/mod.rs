//! Drives a run: from its journal to the next decision, from the decision to its effects.

mod admission;
mod calls;
mod claims;
mod clock;
pub mod decide;
mod drive;
mod estimates;
mod guards;
mod observers;
pub mod plan;
mod requests;
pub mod state;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use self::admission::Admitted;
pub(crate) use self::drive::outcome_of;
use self::drive::{Decide, Driver};
pub use self::observers::Observer;
use self::observers::Observers;
use crate::entry::{Cause, Demand, Entry, Health, Request};
use crate::error::StepError;
use crate::journal::{Journal, JournalError};
use crate::names::{RunId, StepId};
use crate::pipeline::Pipeline;
use crate::secret::Secrets;
use crate::transition::RunState;

/// How often an asker looks for the answer to its request.
const ANSWER_POLL: Duration = Duration::from_millis(100);

/// Drives upgrades, each under a lease, with one journal.
///
/// # Guarantees
/// A run completes, or everything it touched is back as it was, and a crash at any instant changes
/// neither. `docs/contract.md` says it point by point, each with its test.
///
/// # Assumptions
/// The steps keep theirs ([`Step`](crate::step::Step)), and the journal its own.
///
/// # Caveats
/// Dropping the future of [`Executor::run`] is a crash like any other: its calls are aborted where
/// they wait, and the run can be resumed. To end it in order, use an [`Interrupt`].
pub struct Executor {
    pub(crate) journal: Arc<dyn Journal>,
    pub(crate) secrets: Secrets,
    pub(crate) observers: Arc<Observers>,
    pub(crate) decide: Decide,
}

/// Answers a demand.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// Nobody drove the run: it was driven here, to this end.
    Driven(Report),
    /// The driver of the run took the demand up.
    Granted,
    /// The driver of the run, or its state, does not allow it.
    Refused {
        /// Why.
        message: String,
    },
}

/// Says how a run ended, or why it waits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// Applied, verified and committed.
    Committed,
    /// Everything is back as it was.
    RolledBack {
        /// Why.
        cause: Option<Cause>,
        /// Whether the system is well.
        health: Health,
    },
    /// A check said no before anything was changed.
    Rejected {
        /// Which, and what it saw.
        cause: Option<Cause>,
    },
    /// Undos failed; an operator decides.
    Stuck {
        /// The steps, each with what its undo said last.
        steps: Vec<(StepId, Option<StepError>)>,
        /// Why the run was rolling back.
        cause: Option<Cause>,
    },
    /// Waits for an operator.
    Held {
        /// Why.
        cause: Option<Cause>,
        /// The state that a resume goes on in.
        state: RunState,
    },
    /// Applied and verified, not yet committed.
    Probation {
        /// When it ends; absent if only a confirmation ends it.
        deadline: Option<jiff::Timestamp>,
    },
    /// Ended by an operator with steps that were not put back.
    Abandoned {
        /// Those steps.
        steps: Vec<StepId>,
    },
}

/// Tells how a run went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The run.
    pub run: RunId,
    /// How it ended, or why it waits.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// Adjusts how a run is driven.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// How long to wait for another driver on the same targets; zero answers at once.
    pub patience: Duration,
    /// Return when the run enters probation instead of staying to its end.
    pub detach: bool,
    /// Take up a run whose definition differs from the pipeline's, with the difference on record.
    pub adopt: bool,
}

/// Interrupts a run from within its process: the three levels of Ctrl-C, the first two of them.
#[derive(Debug, Clone, Default)]
pub struct Interrupt {
    pub(crate) level: tokio::sync::watch::Sender<u8>,
}

impl Interrupt {
    /// Makes a handle that has not been pulled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets the running steps finish, then holds the run.
    pub fn stop(&self) {
        self.level.send_if_modified(|level| std::mem::replace(level, (*level).max(1)) < 1);
    }

    /// Cancels the running steps and rolls back.
    pub fn cancel(&self) {
        self.level.send_if_modified(|level| std::mem::replace(level, 2) < 2);
    }
}

/// Says why a run was not driven, or not to an outcome.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExecutorError {
    /// Another run, a rule or the state of the run forbids it. Nothing was changed.
    #[error("{message}")]
    Refused {
        /// What forbids it.
        message: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// The journal failed: the run halts where it is and can be resumed.
    #[error("the journal failed; the run halts where it is and can be resumed")]
    Journal(#[from] JournalError),
    /// What stands in the journal is not what a run can have written.
    #[error("the journal of run {run} is corrupt at line {line}: {reason}")]
    Corrupt {
        /// The run.
        run: String,
        /// The line, from one.
        line: u64,
        /// What is wrong.
        reason: String,
    },
    /// The pipeline could not be read or prepared; nothing was changed.
    #[error("the pipeline cannot be carried out: {0}")]
    Pipeline(StepError),
}

impl Executor {
    /// Makes an executor that writes to `journal` and resolves `env` and `file` secrets.
    pub fn new(journal: Arc<dyn Journal>) -> Self {
        Self { journal, secrets: Secrets::default(), observers: Arc::default(), decide: decide::decide }
    }

    /// Resolves secrets with `secrets`.
    #[must_use]
    pub fn with_secrets(mut self, secrets: Secrets) -> Self {
        self.secrets = secrets;
        self
    }

    /// Lets an observer watch every run of this executor.
    #[must_use]
    pub fn observer(mut self, observer: impl Observer) -> Self {
        match Arc::get_mut(&mut self.observers) {
            Some(observers) => observers.add(observer),
            None => tracing::warn!("an observer was added while a run is driven; it sees nothing"),
        }
        self
    }

    /// Replaces the decisions: only to try whether the sweeps notice.
    #[cfg(feature = "testkit")]
    pub(crate) fn with_decide(mut self, decide: Decide) -> Self {
        self.decide = decide;
        self
    }

    /// Carries out a new run of `pipeline` and stays to its end, the probation included.
    ///
    /// A second call makes a second run: it finds its steps unchanged, or is refused while the
    /// first is open.
    ///
    /// # Errors
    /// [`ExecutorError::Refused`] before anything was changed; [`ExecutorError::Journal`] at any
    /// time: the run halts and can be resumed.
    pub async fn run(
        &self,
        pipeline: &Pipeline,
        options: &RunOptions,
        interrupt: &Interrupt,
    ) -> Result<Report, ExecutorError> {
        let admitted = self.admit_new(pipeline, options).await?;
        let driver = self.driver(pipeline, admitted).await?;
        // A whole run in one future: on the heap, so that whoever awaits it stays small.
        Box::pin(driver.drive(options, interrupt)).await
    }

    /// Goes on with a run where it is: after a crash, after a stop, after a hold.
    ///
    /// A run that is over is reported as it ended.
    ///
    /// # Errors
    /// As [`Executor::run`]; [`ExecutorError::Refused`] too if another driver has the run, if the
    /// pipeline is another one, or if the run is stuck.
    pub async fn resume(
        &self,
        pipeline: &Pipeline,
        run: &RunId,
        options: &RunOptions,
        interrupt: &Interrupt,
    ) -> Result<Report, ExecutorError> {
        self.drive_on(pipeline, run, Request::new(Demand::Resume), options, interrupt).await
    }

    /// Asks something of a run: drives it if nobody does, else leaves a durable request and waits
    /// for the driver's answer.
    ///
    /// # Errors
    /// As [`Executor::resume`].
    pub async fn demand(
        &self,
        pipeline: &Pipeline,
        run: &RunId,
        demand: Demand,
        options: &RunOptions,
        interrupt: &Interrupt,
    ) -> Result<Answer, ExecutorError> {
        // One request, whoever takes it up: a driver that finds it posted, or this process itself.
        let request = Request::new(demand);
        let mut posted = false;
        loop {
            let options = RunOptions { patience: Duration::ZERO, ..options.clone() };
            match self.drive_on(pipeline, run, request.clone(), &options, interrupt).await {
                Err(ExecutorError::Journal(JournalError::Held { .. })) => {}
                driven => {
                    if posted {
                        self.journal.withdraw(run, &request.id).await?;
                    }
                    return match driven {
                        Ok(report) => Ok(Answer::Driven(report)),
                        Err(ExecutorError::Refused { message, hint: None }) => Ok(Answer::Refused { message }),
                        Err(error) => Err(error),
                    };
                }
            }
            if !posted {
                self.journal.post(run, &request).await?;
                posted = true;
            }
            if let Some(answer) = self.await_answer(run, &request.id).await? {
                return Ok(answer);
            }
        }
    }

    /// Looks for the answer to a request for a while; `None` if the driver may have died.
    async fn await_answer(&self, run: &RunId, request: &str) -> Result<Option<Answer>, ExecutorError> {
        let end = Instant::now() + Duration::from_secs(2);
        while Instant::now() < end {
            for record in self.journal.load(run).await?.iter().rev() {
                if let Entry::RequestAnswered { id, refused } = &record.entry
                    && id == request
                {
                    return Ok(Some(match refused {
                        None => Answer::Granted,
                        Some(message) => Answer::Refused { message: message.clone() },
                    }));
                }
            }
            tokio::time::sleep(ANSWER_POLL).await;
        }
        Ok(None)
    }

    async fn drive_on(
        &self,
        pipeline: &Pipeline,
        run: &RunId,
        request: Request,
        options: &RunOptions,
        interrupt: &Interrupt,
    ) -> Result<Report, ExecutorError> {
        let forward = matches!(request.demand, Demand::Resume | Demand::Confirm { .. });
        let admitted = self.admit_again(pipeline, run, options, forward).await?;
        if admitted.run.state().is_final()
            && (request.demand == Demand::Resume || admitted.run.has_answered(&request.id))
        {
            return Ok(Report { run: run.clone(), outcome: outcome_of(&admitted.run) });
        }
        if !admitted.run.has_answered(&request.id)
            && let Some(message) = requests::refusal(pipeline, &admitted.run, &request.demand)
        {
            return Err(ExecutorError::Refused { message, hint: None });
        }
        let mut driver = self.driver(pipeline, admitted).await?;
        driver.take_up(request)?;
        // A whole run in one future: on the heap, so that whoever awaits it stays small.
        Box::pin(driver.drive(options, interrupt)).await
    }

    async fn driver<'a>(&'a self, pipeline: &Pipeline, admitted: Admitted) -> Result<Driver<'a>, ExecutorError> {
        let Admitted { lease, run, mut entries, is_new } = admitted;
        let undo_estimates = match pipeline.budget.run {
            Some(_) => self.estimates(pipeline).await?.undo_ms,
            None => BTreeMap::new(),
        };
        let created = is_new.then(|| entries.remove(0));
        let mut driver = Driver::new(self, pipeline, lease, run, undo_estimates).await?;
        driver.begin(created);
        for entry in entries {
            driver.note(entry)?;
        }
        // Durable before anything else: from here on the run blocks others, whatever happens.
        driver.flush().await?;
        driver.claim().await?;
        Ok(driver)
    }
}
