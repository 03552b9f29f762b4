//! Archives of file trees: read without trust, written with proof.
//!
//! An archive is somebody else's input. What it holds is checked entry by entry, before any of it
//! reaches the disk, and it is unpacked only into a directory of its own.

mod frames;
pub(crate) mod manifest;
pub(crate) mod name;
pub(crate) mod pack;
pub(crate) mod prove;
pub(crate) mod reader;
pub(crate) mod tree;
pub(crate) mod unpack;

use std::io;
use std::path::{Path, PathBuf};

use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use crate::error::{cancelled, io_error};

/// Bounds what an archive may become.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// The most bytes that it may unpack to, headers included.
    pub(crate) unpacked: u64,
    /// The most entries.
    pub(crate) entries: usize,
    /// How many times its packed size it may unpack to, past the first [`Limits::RATIO_FREE`].
    pub(crate) ratio: u64,
}

impl Limits {
    /// What a small archive may unpack to whatever its ratio: a page of zeros is no bomb.
    pub(crate) const RATIO_FREE: u64 = 16 << 20;
}

impl Default for Limits {
    fn default() -> Self {
        Self { unpacked: 10 << 30, entries: 1_000_000, ratio: 100 }
    }
}

/// Says why an archive was not read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum ArchiveError {
    #[error("{}: entry `{entry}` is refused: {reason}", archive.display())]
    Refused { archive: PathBuf, entry: String, reason: String },
    #[error("{} is refused: {reason}", archive.display())]
    Unfit { archive: PathBuf, reason: String },
    #[error("{} is damaged", archive.display())]
    Damaged { archive: PathBuf, source: io::Error },
    #[error("{} kept changing while it was read", path.display())]
    Changing { path: PathBuf },
    #[error("cannot {action} {}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("cancelled")]
    Cancelled,
}

impl ArchiveError {
    pub(crate) fn io<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::Io { action, path: path.to_path_buf(), source }
    }
}

impl From<ArchiveError> for StepError {
    fn from(error: ArchiveError) -> Self {
        let (class, hint) = match &error {
            ArchiveError::Refused { .. } | ArchiveError::Unfit { .. } => (
                StepError::permanent as fn(String) -> StepError,
                "nothing was unpacked; have the archive built again without it",
            ),
            ArchiveError::Damaged { .. } => {
                (StepError::permanent as _, "fetch or build the archive again and compare its digest")
            }
            ArchiveError::Changing { .. } => {
                (StepError::transient as _, "stop what writes to it before this step, or list it under `exclude`")
            }
            ArchiveError::Cancelled => return cancelled(),
            ArchiveError::Io { source, .. } => return io_error(error.to_string(), source),
        };
        let failed = class(error.to_string()).with_hint(hint);
        // Without the error itself, whose text it has already.
        match std::error::Error::source(&error) {
            Some(source) => failed.with_cause(source),
            None => failed,
        }
    }
}

/// Reports progress and ends the work when the call is cancelled.
pub(crate) fn watch(cx: &Context, done: u64, total: u64, message: &str) -> Result<(), ArchiveError> {
    if cx.cancelled().is_cancelled() {
        return Err(ArchiveError::Cancelled);
    }
    cx.progress(done, total, message);
    Ok(())
}

/// Tells whether a text is a SHA-256 digest in hexadecimal.
pub(crate) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}
