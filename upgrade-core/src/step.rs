//! One change and how it is undone: the traits that every step implements.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::context::Context;
use crate::error::StepError;
use crate::names::StepId;
use crate::target::Target;

/// Makes one change to the running system.
///
/// # Guarantees
/// What the executor promises to a step:
/// - `prepare` runs when everything that the step needs has been applied, and what it returned
///   is durable in the journal before `apply` is called for the first time.
/// - A step whose `prepare` answered [`Prepared::Unchanged`] is neither applied nor undone.
/// - Only one call on a step runs at a time. A call that did not return, even after its
///   cancellation and the grace, holds the run; nothing is undone beside it.
/// - After a crash, `settle` is called before the next `apply` or `rollback`.
///
/// # Assumptions
/// What a step promises to the executor:
/// - `prepare` and `settle` change nothing that the upgrade is about.
/// - `apply` changes only what equals the state found or the state intended, and answers a
///   third state with [`StepError::conflict`], unless [`Context::on_conflict`] says otherwise.
/// - `apply` called again with the same undo record converges: after all, part or nothing of it.
/// - Undo record, output and checkpoints hold no secret: tokens (digests, versions, ids) and
///   references. What must be kept whole goes to [`Context::seal`].
/// - Every call watches [`Context::cancelled`] and returns soon after it is signalled.
///
/// # Caveats
/// A panic in a call is caught and counts as an error of class *unknown*.
///
/// # Errors
/// An error of class *transient* is tried again as often as the step's policy says; any other
/// fails the step, and with it the run, which is then undone, this step included.
#[async_trait]
pub trait Step: Send + Sync + 'static {
    /// Names the kind of step, as a pipeline file does: `host.file`.
    const KIND: &'static str;

    /// Numbers the format of `Undo`, `Output` and checkpoints that this code writes.
    const FORMAT: u32 = 1;

    /// Holds what undoing needs; durable before the first effect.
    type Undo: Serialize + DeserializeOwned + Send + Sync;

    /// Holds what later steps and the report see.
    type Output: Serialize + DeserializeOwned + Send + Sync;

    /// Reads the present state and says what would change; changes nothing.
    ///
    /// Called again after a crash that came before its answer was durable, and by `plan`
    /// ([`Context::is_dry_run`]).
    async fn prepare(&self, cx: &Context) -> Result<Prepared<Self::Undo, Self::Output>, StepError>;

    /// Makes the change.
    ///
    /// May be called again, after an error or a crash, with the same undo record; must converge.
    async fn apply(&self, cx: &Context, undo: &Self::Undo) -> Result<Self::Output, StepError>;

    /// Ends or awaits what an interrupted call left running: processes, sessions, containers.
    ///
    /// Called before an `apply` or a `rollback` that follows a crash or a failure. A second call
    /// finds nothing to do.
    async fn settle(&self, _cx: &Context, _undo: &Self::Undo) -> Result<(), StepError> {
        Ok(())
    }

    /// Removes what only undo needed, once the upgrade is confirmed.
    ///
    /// May be called again after a crash; what is gone already is not an error.
    async fn commit(&self, _cx: &Context, _undo: &Self::Undo) -> Result<(), StepError> {
        Ok(())
    }

    /// Describes the configuration as far as it makes this step another one.
    ///
    /// It is part of the run's fingerprint: leave out timeouts, and name secrets by reference.
    fn definition(&self) -> Value {
        Value::Null
    }

    /// Lists the files whose content is part of the run's fingerprint.
    fn inputs(&self) -> Vec<PathBuf> {
        Vec::new()
    }

    /// Lists what the step changes, so that no other run changes it at the same time.
    fn targets(&self) -> Vec<Arc<dyn Target>> {
        Vec::new()
    }

    /// Reads an undo record of this or an earlier format.
    ///
    /// # Errors
    /// The format is not one that this code ever wrote; the step is then *stuck*.
    fn read_undo(format: u32, value: Value) -> Result<Self::Undo, FormatError> {
        FormatError::check(format, Self::FORMAT)?;
        Ok(serde_json::from_value(value)?)
    }

    /// Reads an output of this or an earlier format.
    ///
    /// # Errors
    /// As [`Step::read_undo`].
    fn read_output(format: u32, value: Value) -> Result<Self::Output, FormatError> {
        FormatError::check(format, Self::FORMAT)?;
        Ok(serde_json::from_value(value)?)
    }
}

/// Puts back what a step found.
///
/// A trait of its own: a step that does not implement it enters a pipeline only as
/// [`irreversible`](crate::pipeline::Builder::irreversible), with a reason.
///
/// ```compile_fail,E0277
/// # use upgrade_core::{context::Context, error::StepError, pipeline::Pipeline, step::{Prepared, Step}};
/// # struct DropsTheTable;
/// # #[async_trait::async_trait]
/// # impl Step for DropsTheTable {
/// #     const KIND: &'static str = "example.drop";
/// #     type Undo = ();
/// #     type Output = ();
/// #     async fn prepare(&self, _: &Context) -> Result<Prepared<(), ()>, StepError> {
/// #         Ok(Prepared::change((), []))
/// #     }
/// #     async fn apply(&self, _: &Context, _: &()) -> Result<(), StepError> {
/// #         Ok(())
/// #     }
/// # }
/// // It has no `Rollback`: `irreversible("drop", DropsTheTable, "the rows are gone")` would do.
/// Pipeline::builder("orders").step("drop", DropsTheTable);
/// ```
///
/// # Guarantees
/// Called for every step that was prepared, whatever came of its `apply`, in reverse order of
/// dependency; never for an *unchanged* step and never after its `commit` began.
///
/// # Assumptions
/// - Puts back what `prepare` found, whether `apply` did all, part or nothing.
/// - Changes only what equals the state intended, the state found or the step's own partial
///   work; a third state is answered with [`StepError::conflict`].
/// - Called again, after an error or a crash, it converges.
///
/// # Errors
/// Tried again with backoff as the step's policy says, then the run is *stuck*.
#[async_trait]
pub trait Rollback: Step {
    /// Puts back what `prepare` found; `output` is there if `apply` is known to have finished.
    async fn rollback(&self, cx: &Context, undo: &Self::Undo, output: Option<&Self::Output>) -> Result<(), StepError>;
}

/// Answers `prepare`.
#[derive(Debug, Clone, PartialEq)]
pub enum Prepared<U, O> {
    /// There is something to do.
    Change {
        /// What undoing needs.
        undo: U,
        /// What the plan shows.
        changes: Vec<Change>,
    },
    /// It is done already: the step is neither applied nor undone.
    Unchanged {
        /// What later steps see.
        output: O,
        /// Why there is nothing to do, in one line.
        reason: String,
    },
    /// In a dry run only: the answer depends on a step that has not run.
    KnownAfter {
        /// The step that must run first.
        step: StepId,
    },
}

impl<U, O> Prepared<U, O> {
    /// Answers that there is something to do.
    pub fn change(undo: U, changes: impl IntoIterator<Item = Change>) -> Self {
        Prepared::Change { undo, changes: changes.into_iter().collect() }
    }

    /// Answers that it is done already.
    pub fn unchanged(output: O, reason: impl Into<String>) -> Self {
        Prepared::Unchanged { output, reason: reason.into() }
    }
}

/// Sorts what a change does to its subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// Makes what was not there.
    Create,
    /// Changes what is there.
    Modify,
    /// Takes away what is there.
    Remove,
    /// Runs something whose effect is its own.
    Run,
}

/// Describes one change for the plan: what `upgrade plan` prints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// What is done.
    pub effect: Effect,
    /// To what: a path, a table, an object, a command.
    pub subject: String,
    /// In one line, how.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// A unified diff, its secret values masked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff: Option<String>,
    /// What data an undo of this change would lose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo_loses: Option<String>,
}

impl Change {
    /// Describes a change of `subject`.
    pub fn new(effect: Effect, subject: impl Into<String>) -> Self {
        Self { effect, subject: subject.into(), summary: None, diff: None, undo_loses: None }
    }

    /// Adds one line on how.
    #[must_use]
    pub fn with_summary(mut self, summary: impl Into<String>) -> Self {
        self.summary = Some(summary.into());
        self
    }

    /// Adds a unified diff; the caller masks secret values.
    #[must_use]
    pub fn with_diff(mut self, diff: impl Into<String>) -> Self {
        self.diff = Some(diff.into());
        self
    }

    /// Names the data that an undo would lose.
    #[must_use]
    pub fn undo_loses(mut self, what: impl Into<String>) -> Self {
        self.undo_loses = Some(what.into());
        self
    }
}

/// Says why a record in a journal cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The record is of a format that this code does not know.
    #[error("the record has format {found}; this program reads up to format {known}")]
    Unknown {
        /// The format of the record.
        found: u32,
        /// The newest format that this code knows.
        known: u32,
    },
    /// The record does not have the shape of its format.
    #[error("the record does not have the shape of its format")]
    Shape(#[from] serde_json::Error),
}

impl FormatError {
    /// Passes if `found` is `known`: what a step does that has written only one format.
    ///
    /// # Errors
    /// The two differ.
    pub fn check(found: u32, known: u32) -> Result<(), Self> {
        if found == known { Ok(()) } else { Err(Self::Unknown { found, known }) }
    }
}
