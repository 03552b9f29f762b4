//! What stands at a path: read, compared and described without showing its content.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use upgrade_core::error::StepError;
use upgrade_core::sealed::hex;

use crate::error::io_error;

/// Contents above this length are never held in memory nor sealed.
pub(crate) const LARGE: u64 = 16 * 1024 * 1024;

/// Tells one state of a path from another, as far as a step compares them.
///
/// Holds digests and attributes, never the content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum PathState {
    /// Nothing stands there.
    Absent,
    /// A regular file.
    File {
        /// SHA-256 of its content, in hexadecimal.
        sha256: String,
        /// Length of its content in bytes.
        length: u64,
        /// Permission bits.
        mode: u32,
        /// Id of its owner.
        user: u32,
        /// Id of its group.
        group: u32,
    },
    /// A symbolic link, itself and not what it points to.
    Symlink {
        /// What it points to.
        target: PathBuf,
        /// Id of its owner.
        user: u32,
        /// Id of its group.
        group: u32,
    },
}

impl PathState {
    /// Returns the digest of the content, if a file stands there.
    pub fn sha256(&self) -> Option<&str> {
        match self {
            PathState::File { sha256, .. } => Some(sha256),
            _ => None,
        }
    }
}

impl fmt::Display for PathState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PathState::Absent => f.write_str("absent"),
            PathState::File { sha256, mode, user, group, .. } => {
                let short = sha256.get(..12).unwrap_or(sha256);
                write!(f, "file sha256:{short} mode {mode:04o} owner {user}:{group}")
            }
            PathState::Symlink { target, user, group } => {
                write!(f, "symbolic link to {} owner {user}:{group}", target.display())
            }
        }
    }
}

/// Tells when something was last modified, to the nanosecond.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Modified {
    /// Seconds since 1970, rounded down.
    pub seconds: i64,
    /// Nanoseconds on top of them.
    pub nanoseconds: u32,
}

impl Modified {
    fn of(metadata: &fs::Metadata) -> Self {
        Self { seconds: metadata.mtime(), nanoseconds: u32::try_from(metadata.mtime_nsec()).unwrap_or(0) }
    }

    pub(crate) fn time(self) -> SystemTime {
        let whole = Duration::from_secs(self.seconds.unsigned_abs());
        let seconds = if self.seconds < 0 { SystemTime::UNIX_EPOCH - whole } else { SystemTime::UNIX_EPOCH + whole };
        seconds + Duration::from_nanos(u64::from(self.nanoseconds))
    }
}

/// Carries what was read at a path. Not `Debug`: the contents may be secret.
pub(crate) struct Observed {
    pub(crate) state: PathState,
    pub(crate) modified: Option<Modified>,
    /// The contents of a file that is not [`LARGE`].
    pub(crate) contents: Option<Vec<u8>>,
}

/// Reads what stands at `path`; refuses what a step cannot put back.
pub(crate) fn observe(path: &Path) -> Result<Observed, StepError> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Observed { state: PathState::Absent, modified: None, contents: None });
        }
        Err(error) => return Err(unreadable(path, &error)),
    };
    if metadata.file_type().is_symlink() {
        let target = fs::read_link(path).map_err(|error| unreadable(path, &error))?;
        if target.to_str().is_none() {
            return Err(StepError::permanent(format!("{} points to a path that is not UTF-8", path.display()))
                .with_hint("replace the link by one whose target is UTF-8, then run again"));
        }
        let state = PathState::Symlink { target, user: metadata.uid(), group: metadata.gid() };
        return Ok(Observed { state, modified: Some(Modified::of(&metadata)), contents: None });
    }
    if !metadata.is_file() {
        let kind = if metadata.is_dir() { "a directory" } else { "a device, pipe or socket" };
        return Err(StepError::permanent(format!("{} is {kind}, not a file", path.display()))
            .with_hint("name the file itself in `path`; this step changes only regular files and symbolic links"));
    }
    observe_file(path).map_err(|error| unreadable(path, &error))
}

fn observe_file(path: &Path) -> io::Result<Observed> {
    // A link put here since the look above must not lead elsewhere.
    let no_follow = i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0);
    let mut file = fs::OpenOptions::new().read(true).custom_flags(no_follow).open(path)?;
    let metadata = file.metadata()?;
    let (sha256, length, contents) = digest(&mut file, metadata.len() <= LARGE)?;
    let mode = metadata.mode() & 0o7777;
    let state = PathState::File { sha256, length, mode, user: metadata.uid(), group: metadata.gid() };
    Ok(Observed { state, modified: Some(Modified::of(&metadata)), contents })
}

/// Digests a file; returns digest, length and, where it is asked for and small enough, contents.
pub(crate) fn digest(file: &mut File, keep: bool) -> io::Result<(String, u64, Option<Vec<u8>>)> {
    let mut hasher = Sha256::new();
    let mut length = 0_u64;
    let mut kept = keep.then(Vec::new);
    let mut buffer = vec![0_u8; 64 * 1024];
    loop {
        let read = match file.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        if read == 0 {
            break;
        }
        let part = buffer.get(..read).unwrap_or_default();
        hasher.update(part);
        length += read as u64;
        if length > LARGE {
            kept = None;
        }
        if let Some(kept) = &mut kept {
            kept.extend_from_slice(part);
        }
    }
    Ok((hex(&hasher.finalize()), length, kept))
}

fn unreadable(path: &Path, error: &io::Error) -> StepError {
    io_error(format!("{} cannot be read", path.display()), error)
}
