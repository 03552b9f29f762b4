//! Values kept beside the journal, sealed: they may hold secrets.

use std::fmt::Display;

use serde::Serialize;
use serde::de::DeserializeOwned;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::sealed::SealedRef;

/// Keeps a value until the run is over; of a plan, only what would refer to it.
///
/// # Errors
/// It could not be made durable.
pub(crate) async fn keep(cx: &Context, value: &(impl Serialize + Sync)) -> Result<SealedRef, StepError> {
    let contents = serde_json::to_vec(value)
        .map_err(|error| StepError::permanent("what was found cannot be kept").with_cause(&error))?;
    if cx.is_dry_run() { Ok(SealedRef::of(&contents)) } else { cx.seal(&contents).await }
}

/// Returns a value that was kept of `what`.
///
/// # Errors
/// It is gone or damaged.
pub(crate) async fn kept<T: DeserializeOwned>(
    cx: &Context,
    reference: &SealedRef,
    what: &(impl Display + Sync),
) -> Result<T, StepError> {
    serde_json::from_slice(&cx.unseal(reference).await?)
        .map_err(|error| StepError::permanent(format!("{what}: what was kept is damaged")).with_cause(&error))
}
