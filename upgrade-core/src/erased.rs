//! Steps of any type behind one object-safe trait over JSON.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::context::Context;
use crate::entry::Versioned;
use crate::error::StepError;
use crate::names::StepId;
use crate::step::{Change, FormatError, Prepared, Rollback, Step};
use crate::target::Target;
use crate::undoable::OptionalRollback;

/// Holds a step of any kind, together with whether it can be undone.
///
/// The only ways to make one are [`AnyStep::reversible`], which asks for a [`Rollback`],
/// [`AnyStep::irreversible`], which asks for a reason, and [`AnyStep::optionally_reversible`], which asks
/// for one of both.
#[derive(Clone)]
pub struct AnyStep {
    step: Arc<dyn ErasedStep>,
    irreversible: Option<String>,
}

impl AnyStep {
    /// Takes a step that can be undone.
    pub fn reversible<S: Rollback>(step: S) -> Self {
        Self { step: Arc::new(Reversible(step)), irreversible: None }
    }

    /// Takes a step that cannot be undone, with the reason that the plan shows.
    pub fn irreversible<S: Step>(step: S, reason: impl Into<String>) -> Self {
        Self { step: Arc::new(Irreversible(step)), irreversible: Some(reason.into()) }
    }

    /// Takes a step that can be undone if its configuration says how, and is irreversible if not.
    pub fn optionally_reversible<S: OptionalRollback>(step: S) -> Self {
        match step.undoable() {
            Ok(undoable) => Self::reversible(undoable),
            Err(step) => {
                let reason = step.irreversible_because().unwrap_or_default();
                Self::irreversible(*step, reason)
            }
        }
    }

    /// Marks the step as one that is not to be undone, for a reason that the plan shows.
    ///
    /// For a step that could be undone and must not be: what follows it would break. A second
    /// call replaces the reason.
    #[must_use]
    pub fn into_irreversible(mut self, reason: impl Into<String>) -> Self {
        self.irreversible = Some(reason.into());
        self
    }

    /// Returns why the step cannot be undone; `None` if it can.
    pub fn irreversible_reason(&self) -> Option<&str> {
        self.irreversible.as_deref()
    }

    pub(crate) fn erased(&self) -> &Arc<dyn ErasedStep> {
        &self.step
    }

    #[cfg(feature = "testkit")]
    pub(crate) fn from_erased(step: Arc<dyn ErasedStep>, irreversible: Option<String>) -> Self {
        Self { step, irreversible }
    }
}

impl std::fmt::Debug for AnyStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AnyStep").field("kind", &self.step.kind()).field("irreversible", &self.irreversible).finish()
    }
}

/// Answers `prepare` with its data written as JSON.
#[derive(Debug, Clone)]
pub(crate) enum AnyPrepared {
    Change { undo: Versioned, changes: Vec<Change> },
    Unchanged { output: Versioned, reason: String },
    KnownAfter { step: StepId },
}

#[async_trait]
pub(crate) trait ErasedStep: Send + Sync + 'static {
    fn kind(&self) -> &str;
    fn format(&self) -> u32;
    fn definition(&self) -> Value;
    fn inputs(&self) -> Vec<PathBuf>;
    fn targets(&self) -> Vec<Arc<dyn Target>>;
    async fn prepare(&self, cx: &Context) -> Result<AnyPrepared, StepError>;
    async fn apply(&self, cx: &Context, undo: &Versioned) -> Result<Versioned, StepError>;
    async fn settle(&self, cx: &Context, undo: &Versioned) -> Result<(), StepError>;
    async fn rollback(&self, cx: &Context, undo: &Versioned, output: Option<&Versioned>) -> Result<(), StepError>;
    async fn commit(&self, cx: &Context, undo: &Versioned) -> Result<(), StepError>;
}

struct Reversible<S>(S);
struct Irreversible<S>(S);

fn unreadable<S: Step>(what: &str, versioned: &Versioned, error: &FormatError) -> StepError {
    StepError::permanent(format!("the {what} of kind `{}`, format {}, cannot be read", versioned.kind, versioned.format))
        .with_cause(error)
        .with_hint(format!(
            "use a version of the program whose `{}` reads format {}, or put the step back by hand and resolve it with --skip",
            S::KIND,
            versioned.format
        ))
}

fn same_kind<S: Step>(what: &str, versioned: &Versioned) -> Result<(), StepError> {
    if versioned.kind == S::KIND {
        return Ok(());
    }
    Err(StepError::permanent(format!("the {what} was written by `{}`, not by `{}`", versioned.kind, S::KIND))
        .with_hint("the pipeline was changed under the run: resume with the one it was started with"))
}

fn read_undo<S: Step>(undo: &Versioned) -> Result<S::Undo, StepError> {
    same_kind::<S>("undo record", undo)?;
    S::read_undo(undo.format, undo.value.clone()).map_err(|e| unreadable::<S>("undo record", undo, &e))
}

fn read_output<S: Step>(output: &Versioned) -> Result<S::Output, StepError> {
    same_kind::<S>("output", output)?;
    S::read_output(output.format, output.value.clone()).map_err(|e| unreadable::<S>("output", output, &e))
}

fn write<S: Step, T: Serialize + DeserializeOwned>(what: &str, value: &T) -> Result<Versioned, StepError> {
    let value = serde_json::to_value(value)
        .map_err(|e| StepError::permanent(format!("the {what} cannot be written as JSON")).with_cause(&e))?;
    Ok(Versioned { kind: S::KIND.to_owned(), format: S::FORMAT, value })
}

async fn prepare<S: Step>(step: &S, cx: &Context) -> Result<AnyPrepared, StepError> {
    Ok(match step.prepare(cx).await? {
        Prepared::Change { undo, changes } => {
            AnyPrepared::Change { undo: write::<S, _>("undo record", &undo)?, changes }
        }
        Prepared::Unchanged { output, reason } => {
            AnyPrepared::Unchanged { output: write::<S, _>("output", &output)?, reason }
        }
        Prepared::KnownAfter { step } => AnyPrepared::KnownAfter { step },
    })
}

macro_rules! erase {
    ($wrapper:ident, $bound:ident, |$self_:ident, $cx:ident, $undo:ident, $output:ident| $rollback:expr) => {
        #[async_trait]
        impl<S: $bound> ErasedStep for $wrapper<S> {
            fn kind(&self) -> &str {
                S::KIND
            }
            fn format(&self) -> u32 {
                S::FORMAT
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
            async fn prepare(&self, cx: &Context) -> Result<AnyPrepared, StepError> {
                prepare(&self.0, cx).await
            }
            async fn apply(&self, cx: &Context, undo: &Versioned) -> Result<Versioned, StepError> {
                let output = self.0.apply(cx, &read_undo::<S>(undo)?).await?;
                write::<S, _>("output", &output)
            }
            async fn settle(&self, cx: &Context, undo: &Versioned) -> Result<(), StepError> {
                self.0.settle(cx, &read_undo::<S>(undo)?).await
            }
            async fn rollback(
                &$self_,
                $cx: &Context,
                $undo: &Versioned,
                $output: Option<&Versioned>,
            ) -> Result<(), StepError> {
                $rollback
            }
            async fn commit(&self, cx: &Context, undo: &Versioned) -> Result<(), StepError> {
                self.0.commit(cx, &read_undo::<S>(undo)?).await
            }
        }
    };
}

erase!(Reversible, Rollback, |self, cx, undo, output| {
    let output = output.map(read_output::<S>).transpose()?;
    self.0.rollback(cx, &read_undo::<S>(undo)?, output.as_ref()).await
});

erase!(Irreversible, Step, |self, _cx, _undo, _output| Err(StepError::permanent(format!(
    "`{}` cannot be undone",
    S::KIND
))));
