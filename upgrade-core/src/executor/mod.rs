//! Drives a run: from its journal to the next decision, from the decision to its effects.

use std::sync::Arc;
use std::time::Duration;

use semver::Version;
use serde::{Deserialize, Serialize};

use crate::context::Progress;
use crate::entry::{Cause, Demand, Health, Record};
use crate::error::StepError;
use crate::journal::{Journal, JournalError, Lease};
use crate::names::{LockName, RunId, StepId};
use crate::pipeline::{CommitMode, Pipeline};
use crate::secret::Secrets;
use crate::step::Change;
use crate::transition::RunState;

/// Watches runs. Cannot fail them, cannot slow them down.
///
/// # Guarantees
/// `entry` is called for every record, in order, after it is durable. Each observer has a thread
/// of its own; one that panics is left out from then on.
///
/// # Caveats
/// Progress may be dropped when the observer is slower than the run; entries are not.
pub trait Observer: Send + 'static {
    /// Sees a record that is durable.
    fn entry(&mut self, run: &RunId, record: &Record);

    /// Sees how far a call has come.
    fn progress(&mut self, _progress: &Progress) {}
}

/// Drives upgrades, each under a lease, with one journal.
pub struct Executor {
    pub(crate) journal: Arc<dyn Journal>,
    pub(crate) secrets: Secrets,
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
        run: RunId,
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
        Self { journal, secrets: Secrets::default() }
    }
}
