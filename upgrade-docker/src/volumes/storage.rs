//! Files of this machine that survive a crash: private, durable, and complete before they have a name.

use std::fs;
use std::io;
use std::path::Path;

use rustix::fs::{CWD, RenameFlags};
pub(crate) use upgrade_core::durable::{
    create_directories, parent, remove_made, sync_directory, temporary, topmost_missing,
};
use upgrade_core::error::StepError;

/// Gives a file a name that nobody has, durably.
pub(crate) fn place(from: &Path, to: &Path) -> io::Result<()> {
    let renamed = match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // A file system without the flag: the look and the move are then two calls.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => match to.symlink_metadata() {
            Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
            Err(_) => fs::rename(from, to),
        },
        other => other.map_err(io::Error::from),
    };
    renamed.and_then(|()| sync_directory(&parent(to)))
}

/// Removes a file durably; one that is gone already is no error.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.and_then(|()| sync_directory(&parent(path))),
    }
}

/// Returns how many bytes are free for this user where `path` is, or will be.
pub(crate) fn free(path: &Path) -> io::Result<u64> {
    let there = path.ancestors().find(|above| !above.as_os_str().is_empty() && above.exists());
    let stat = rustix::fs::statvfs(there.unwrap_or(Path::new(".")))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Classes an error of the file system: what a person must mend is permanent.
pub(crate) fn failed(what: impl Into<String>, error: &io::Error) -> StepError {
    use io::ErrorKind as Kind;
    let (permanent, hint) = match error.kind() {
        Kind::StorageFull | Kind::QuotaExceeded => (true, "free some space on that file system, then try again"),
        Kind::PermissionDenied => (true, "run as a user who may write there, or name another directory"),
        Kind::NotFound => (true, "check that the path and the directory above it exist"),
        Kind::ReadOnlyFilesystem => (true, "mount the file system writable, or name another directory"),
        Kind::AlreadyExists | Kind::NotADirectory | Kind::IsADirectory => {
            (true, "look at what is there and move it away")
        }
        Kind::InvalidData | Kind::UnexpectedEof => (true, "it is damaged: take another backup, or make it again"),
        _ => (false, "try again; if it persists, look at the file system and the kernel's log (`dmesg`)"),
    };
    let class = if permanent { StepError::permanent } else { StepError::transient };
    class(what.into()).with_cause(error).with_hint(hint)
}
