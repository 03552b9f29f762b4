//! What a step or a check is given when it is called.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use semver::Version;
use serde::Deserialize;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::error::StepError;
use crate::journal::Lease;
use crate::names::{RunId, StepId};
use crate::sealed::{SealedRef, SealedStorage};
use crate::secret::{SecretRef, SecretString, Secrets};

/// Says which way a step is being driven.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Towards the new version.
    Forward,
    /// Back to what was found.
    Back,
    /// Past the point of no return: removing what undo needed.
    Commit,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Direction::Forward => "forward",
            Direction::Back => "back",
            Direction::Commit => "commit",
        })
    }
}

/// Says what a step does when it meets a state that is neither found nor intended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "file", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum OnConflict {
    /// Answers with [`StepError::conflict`] and touches nothing.
    #[default]
    Stop,
    /// Writes over the foreign change.
    Overwrite,
}

/// Tells how far a long call has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The run.
    pub run: RunId,
    /// The step, or the check for a check's own progress.
    pub step: String,
    /// The direction.
    pub direction: Direction,
    /// How much is done, in units of the step's own.
    pub done: u64,
    /// How much there is to do, where it is known.
    pub total: Option<u64>,
    /// What is being done, in a few words.
    pub message: String,
}

/// Holds what a check answered before the run.
#[derive(Debug, Clone, Default)]
pub(crate) struct Baseline {
    pub(crate) figures: BTreeMap<String, f64>,
    pub(crate) facts: BTreeMap<String, String>,
}

/// Connects a context to the run behind it.
#[async_trait]
pub(crate) trait Backend: Send + Sync + 'static {
    async fn checkpoint(&self, value: Value) -> Result<(), StepError>;
    fn progress(&self, progress: Progress);
}

#[derive(Clone)]
pub(crate) struct Parts {
    pub(crate) run: RunId,
    pub(crate) subject: String,
    pub(crate) kind: String,
    pub(crate) direction: Direction,
    pub(crate) attempt: u32,
    pub(crate) interrupted: bool,
    pub(crate) dry_run: bool,
    pub(crate) cancelled: CancellationToken,
    pub(crate) deadline: Option<Instant>,
    pub(crate) on_conflict: OnConflict,
    pub(crate) environment: Option<String>,
    pub(crate) from: Option<Version>,
    pub(crate) to: Option<Version>,
    pub(crate) outputs: Arc<BTreeMap<StepId, Value>>,
    pub(crate) baseline: Baseline,
    pub(crate) is_baseline: bool,
    pub(crate) checkpoint: Option<Value>,
    pub(crate) secrets: Secrets,
    pub(crate) sealed: Arc<dyn SealedStorage>,
    pub(crate) backend: Arc<dyn Backend>,
}

/// Gives a step or a check all it may know and use: identity, time, cancellation, storage.
///
/// Cheap to clone; every clone is the same context.
#[derive(Clone)]
pub struct Context {
    parts: Arc<Parts>,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("key", &self.key())
            .field("attempt", &self.parts.attempt)
            .finish_non_exhaustive()
    }
}

impl Context {
    pub(crate) fn new(parts: Parts) -> Self {
        Self { parts: Arc::new(parts) }
    }

    /// Returns this call with other figures to compare with: for a check that a step asks itself, of one side
    /// of what it measures against the other.
    #[must_use]
    pub fn with_baseline(&self, figures: BTreeMap<String, f64>) -> Self {
        let baseline = Baseline { figures, facts: BTreeMap::new() };
        Self::new(Parts { baseline, is_baseline: false, ..(*self.parts).clone() })
    }

    /// Returns the run that this call belongs to.
    pub fn run(&self) -> &RunId {
        &self.parts.run
    }

    /// Returns the id of the step or check that is called.
    pub fn subject(&self) -> &str {
        &self.parts.subject
    }

    /// Returns the direction of the call.
    pub fn direction(&self) -> Direction {
        self.parts.direction
    }

    /// Returns the idempotency key: run, step and direction, the same on every attempt.
    pub fn key(&self) -> String {
        format!("{}/{}/{}", self.parts.run, self.parts.subject, self.parts.direction)
    }

    /// Returns the marker that names what the step started, in both directions.
    ///
    /// Put it where it can be found again after a crash: in a process's environment under
    /// [`Context::MARKER`], in a label, in an `application_name`.
    pub fn marker(&self) -> String {
        format!("{}/{}", self.parts.run, self.parts.subject)
    }

    /// Names the environment variable that carries [`Context::marker`].
    pub const MARKER: &'static str = "UPGRADE_MARKER";

    /// Counts the attempts at this call, from one.
    pub fn attempt(&self) -> u32 {
        self.parts.attempt
    }

    /// Tells whether an earlier attempt was cut off by a crash, so that nobody saw its end.
    pub fn is_interrupted(&self) -> bool {
        self.parts.interrupted
    }

    /// Tells whether this is a plan: nothing may be changed, nothing will be applied.
    pub fn is_dry_run(&self) -> bool {
        self.parts.dry_run
    }

    /// Returns the token that is signalled when the call must end.
    pub fn cancelled(&self) -> &CancellationToken {
        &self.parts.cancelled
    }

    /// Returns when the call will be cancelled, if it has a timeout.
    pub fn deadline(&self) -> Option<Instant> {
        self.parts.deadline
    }

    /// Says what to do about a state that is neither found nor intended.
    pub fn on_conflict(&self) -> OnConflict {
        self.parts.on_conflict
    }

    /// Returns the environment that is upgraded, if the pipeline names one.
    pub fn environment(&self) -> Option<&str> {
        self.parts.environment.as_deref()
    }

    /// Returns the version found before the run, if it is known.
    pub fn from(&self) -> Option<&Version> {
        self.parts.from.as_ref()
    }

    /// Returns the version that the pipeline leads to, if it names one.
    pub fn to(&self) -> Option<&Version> {
        self.parts.to.as_ref()
    }

    /// Reports how far the call has come. Never blocks, never fails, never journaled.
    pub fn progress(&self, done: u64, total: impl Into<Option<u64>>, message: impl Into<String>) {
        self.parts.backend.progress(Progress {
            run: self.parts.run.clone(),
            step: self.parts.subject.clone(),
            direction: self.parts.direction,
            done,
            total: total.into(),
            message: self.parts.secrets.mask(&message.into()),
        });
    }

    /// Makes a point durable from which this call can go on after a crash.
    ///
    /// # Errors
    /// The journal did not take it: return at once, nothing more may be done.
    pub async fn checkpoint<T: Serialize + Sync>(&self, value: &T) -> Result<(), StepError> {
        let value = serde_json::to_value(value)
            .map_err(|error| StepError::permanent("the checkpoint cannot be written as JSON").with_cause(&error))?;
        self.parts.backend.checkpoint(value).await
    }

    /// Returns the last checkpoint of this step in this direction, if there is one.
    ///
    /// # Errors
    /// It does not have the shape of `T`.
    pub fn last_checkpoint<T: DeserializeOwned>(&self) -> Result<Option<T>, StepError> {
        self.parts
            .checkpoint
            .clone()
            .map(serde_json::from_value)
            .transpose()
            .map_err(|error| StepError::permanent("the last checkpoint cannot be read").with_cause(&error))
    }

    /// Returns the output of an earlier step.
    ///
    /// # Errors
    /// The step has no output (it did not run, or is not needed by this one), or another shape.
    pub fn output<T: DeserializeOwned>(&self, step: &StepId) -> Result<T, StepError> {
        let value = self.parts.outputs.get(step).ok_or_else(|| {
            StepError::permanent(format!("step `{step}` has no output"))
                .with_hint(format!("let this step need `{step}`, so that it runs first"))
        })?;
        serde_json::from_value(value.clone()).map_err(|error| {
            StepError::permanent(format!("the output of step `{step}` has another shape")).with_cause(&error)
        })
    }

    /// Returns a figure that this check measured before the run.
    pub fn baseline(&self, name: &str) -> Option<f64> {
        self.parts.baseline.figures.get(name).copied()
    }

    /// Returns a text that this check read before the run.
    pub fn baseline_fact(&self, name: &str) -> Option<&str> {
        self.parts.baseline.facts.get(name).map(String::as_str)
    }

    /// Returns every text that this check read before the run, by name.
    pub fn baseline_facts(&self) -> &BTreeMap<String, String> {
        &self.parts.baseline.facts
    }

    /// Tells whether this check is asked before the run, so that its answer is the baseline itself.
    ///
    /// When it is not, and nothing was read before the run, there is nothing to compare with: the
    /// answer is *unknown*.
    pub fn is_baseline(&self) -> bool {
        self.parts.is_baseline
    }

    /// Resolves a secret; what it returns is masked in all that the run writes.
    ///
    /// # Errors
    /// The reference cannot be resolved.
    pub async fn secret(&self, reference: &SecretRef) -> Result<SecretString, StepError> {
        self.parts.secrets.resolve(reference).await
    }

    /// Masks `secret` from now on in all that the run writes: what is part of a resolved one, a
    /// password within a URL.
    pub fn remember_secret(&self, secret: &SecretString) {
        self.parts.secrets.remember(secret);
    }

    /// Masks every secret that the run has resolved.
    pub fn mask(&self, text: &str) -> String {
        self.parts.secrets.mask(text)
    }

    /// Keeps contents that were found, durably and outside the journal, until the run is over.
    ///
    /// # Errors
    /// They could not be made durable.
    pub async fn seal(&self, contents: &[u8]) -> Result<SealedRef, StepError> {
        self.parts.sealed.put(contents).await
    }

    /// Returns sealed contents.
    ///
    /// # Errors
    /// They are gone or damaged.
    pub async fn unseal(&self, reference: &SealedRef) -> Result<Vec<u8>, StepError> {
        self.parts.sealed.get(reference).await
    }

    /// Returns the kind of step or check that is called.
    pub fn kind(&self) -> &str {
        &self.parts.kind
    }
}

tokio::task_local! {
    /// The lease under which the present call is made.
    pub(crate) static LEASE: Arc<Lease>;
}

/// Runs work that blocks, on a thread where it holds up nobody.
///
/// # Guarantees
/// Such work cannot be cancelled: it goes on when the call that awaits it is given up, after its
/// grace or with its driver. Called from a step, it keeps the run's lease until it returns, so
/// that nobody resumes or undoes the step beside it.
///
/// # Errors
/// What the work says; a panic in it is of class *unknown*.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StepError> + Send + 'static,
) -> Result<T, StepError> {
    let lease = LEASE.try_with(Arc::clone).ok();
    let work = move || {
        let done = work();
        drop(lease);
        done
    };
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(StepError::unknown("work on a thread of its own ended early")
            .with_cause(&error)
            .with_hint("this is a defect of the step kind: report it; `upgrade resume` goes on"))
    })
}
