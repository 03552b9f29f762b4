//! Errors of the file system as a step reports them, and file work that may block.

use std::io;

use upgrade_core::context::Context;
pub(crate) use upgrade_core::context::blocking;
use upgrade_core::error::StepError;

/// Classes an error of the file system: what a person must mend is permanent, the rest is worth
/// another try.
pub(crate) fn io_error(what: impl Into<String>, error: &io::Error) -> StepError {
    use io::ErrorKind as Kind;
    let (permanent, hint) = match error.kind() {
        Kind::PermissionDenied => (true, "run as a user who may change this path and its owner"),
        Kind::NotFound => (true, "check that the path and the directory above it exist"),
        Kind::StorageFull | Kind::QuotaExceeded => (true, "free some space on that file system, then try again"),
        Kind::ReadOnlyFilesystem => (true, "mount the file system writable, then try again"),
        Kind::AlreadyExists | Kind::NotADirectory | Kind::IsADirectory => {
            (true, "look at what is there and move it away")
        }
        _ => (false, "try again; if it persists, look at the file system and the kernel's log (`dmesg`)"),
    };
    let class = if permanent { StepError::permanent } else { StepError::transient };
    class(what.into()).with_cause(error).with_hint(hint)
}

/// Ends the work when the call is cancelled, before it changes anything more.
pub(crate) fn not_cancelled(cx: &Context) -> Result<(), StepError> {
    if cx.cancelled().is_cancelled() {
        return Err(cancelled());
    }
    Ok(())
}

/// Says that the call was asked to end.
pub(crate) fn cancelled() -> StepError {
    StepError::transient("cancelled before it was done")
        .with_hint("run `upgrade resume` to go on, or `upgrade rollback` to put everything back")
}
