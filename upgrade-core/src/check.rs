//! A question with a verdict.

use async_trait::async_trait;
use serde_json::Value;

use crate::context::Context;
use crate::error::CheckError;
use crate::verdict::Verdict;

/// Asks a question about the running system and measures what it needs for the answer.
///
/// # Guarantees
/// The executor bounds every call by the check's timeout (an overrun is *unknown*), repeats it
/// as the pipeline says, and never takes *unknown* for a pass.
///
/// # Assumptions
/// A check changes nothing. It may be called at any time, beside running steps and beside other
/// calls of itself: as a pre-check, before and after a step, as a guard, as a verification.
///
/// # Errors
/// An error means that the measurement failed: its verdict is *unknown*. What was measured and
/// found wanting is a [`Verdict`] with status *fail*, not an error.
#[async_trait]
pub trait Check: Send + Sync + 'static {
    /// Measures and answers.
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError>;

    /// Names the kind of check, as a pipeline file does: `http.get`.
    fn kind(&self) -> &str {
        "check"
    }

    /// Describes the configuration for the run's fingerprint, as [`Step::definition`] does.
    ///
    /// [`Step::definition`]: crate::step::Step::definition
    fn definition(&self) -> Value {
        Value::Null
    }

    /// Tells whether the answer compares with what was measured before the run.
    ///
    /// If so, the executor asks once while the run is *checking*; [`Context::baseline`] gives the
    /// figures of that answer, [`Context::baseline_fact`] its texts.
    fn needs_baseline(&self) -> bool {
        false
    }
}

/// A shared check is a check: one whose type is known only at run time enters a pipeline like any
/// other.
#[async_trait]
impl<C: Check + ?Sized> Check for std::sync::Arc<C> {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        (**self).check(cx).await
    }

    fn kind(&self) -> &str {
        (**self).kind()
    }

    fn definition(&self) -> Value {
        (**self).definition()
    }

    fn needs_baseline(&self) -> bool {
        (**self).needs_baseline()
    }
}
