//! Kinds of which only some steps can be undone: those whose configuration says how.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use serde_json::Value;

use crate::context::Context;
use crate::error::StepError;
use crate::step::{FormatError, Prepared, Rollback, Step};
use crate::target::Target;

/// Undoes a step, where its configuration says how.
///
/// Such a step does not implement [`Rollback`] itself: only [`Undoable`] does, and one is had only of
/// a step that can be undone. So whether a pipeline may hold it is still asked of the compiler.
///
/// # Guarantees
/// As [`Rollback`].
///
/// # Assumptions
/// As [`Rollback`]; `rollback` is called only where [`Self::irreversible_because`] answers `None`.
///
/// # Errors
/// As [`Rollback`].
#[async_trait]
pub trait OptionalRollback: Step {
    /// Says why this very step cannot be undone; `None` if it can.
    fn irreversible_because(&self) -> Option<&'static str>;

    /// Puts back what `prepare` found; see [`Rollback::rollback`].
    async fn rollback(&self, cx: &Context, undo: &Self::Undo, output: Option<&Self::Output>) -> Result<(), StepError>;

    /// Returns the step as one that can be undone.
    ///
    /// # Errors
    /// It cannot; the step is given back.
    fn undoable(self) -> Result<Undoable<Self>, Box<Self>>
    where
        Self: Sized,
    {
        if self.irreversible_because().is_none() { Ok(Undoable(self)) } else { Err(Box::new(self)) }
    }
}

/// Holds a step that can be undone, though not every one of its kind can.
#[derive(Debug, Clone)]
pub struct Undoable<S>(S);

impl<S: OptionalRollback> Undoable<S> {
    /// Takes a step that was just told how it is undone: for the methods of its type that tell it.
    pub fn told(step: S) -> Self {
        Self(step)
    }
}

#[async_trait]
impl<S: OptionalRollback> Step for Undoable<S> {
    const KIND: &'static str = S::KIND;
    const FORMAT: u32 = S::FORMAT;
    type Undo = S::Undo;
    type Output = S::Output;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<S::Undo, S::Output>, StepError> {
        self.0.prepare(cx).await
    }

    async fn apply(&self, cx: &Context, undo: &S::Undo) -> Result<S::Output, StepError> {
        self.0.apply(cx, undo).await
    }

    async fn settle(&self, cx: &Context, undo: &S::Undo) -> Result<(), StepError> {
        self.0.settle(cx, undo).await
    }

    async fn commit(&self, cx: &Context, undo: &S::Undo) -> Result<(), StepError> {
        self.0.commit(cx, undo).await
    }

    fn definition(&self) -> Value {
        self.0.definition()
    }

    fn inputs(&self) -> Vec<PathBuf> {
        self.0.inputs()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        self.0.targets()
    }

    fn read_undo(format: u32, value: Value) -> Result<S::Undo, FormatError> {
        S::read_undo(format, value)
    }

    fn read_output(format: u32, value: Value) -> Result<S::Output, FormatError> {
        S::read_output(format, value)
    }
}

#[async_trait]
impl<S: OptionalRollback> Rollback for Undoable<S> {
    async fn rollback(&self, cx: &Context, undo: &S::Undo, output: Option<&S::Output>) -> Result<(), StepError> {
        self.0.rollback(cx, undo, output).await
    }
}
