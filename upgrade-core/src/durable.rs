//! Names and directories that survive a crash: what every adapter that keeps files writes with.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags};

use crate::error::StepError;
use crate::sealed::sha256_hex;

/// Names what `key` writes beside `path` before it has its name: always the same one, so that what a
/// crash left is found and replaced.
pub fn temporary(path: &Path, key: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.upgrade-{}", &sha256_hex(key.as_bytes())[..12]))
}

/// Makes the names in a directory durable.
///
/// # Errors
/// The directory cannot be opened or synced.
pub fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// Gives a file a name that nobody has, durably.
///
/// # Errors
/// Somebody has it; it cannot be moved or synced.
pub fn place(from: &Path, to: &Path) -> io::Result<()> {
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
///
/// # Errors
/// It cannot be removed, or the removal not be synced.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.and_then(|()| sync_directory(&parent(path))),
    }
}

/// Returns how many bytes are free for this user where a path is, or will be.
///
/// # Errors
/// The file system cannot be asked.
pub fn free(path: &Path) -> io::Result<u64> {
    let there = path.ancestors().find(|above| !above.as_os_str().is_empty() && above.exists());
    let stat = rustix::fs::statvfs(there.unwrap_or(Path::new(".")))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Classes an error of the file system: what a person must mend is permanent.
pub fn failed(what: impl Into<String>, error: &io::Error) -> StepError {
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

/// Chooses the backups of a step beyond its newest `keep`, of the names in their directory.
///
/// They are named `STEP-VERSION-RUN` and the suffix; others are not looked at. Run ids sort by time.
pub fn beyond_newest(names: Vec<String>, step: &str, suffix: &str, keep: usize) -> Vec<String> {
    const RUN: usize = 36;
    let run = |name: &str| -> Option<String> {
        let middle = name.strip_prefix(step)?.strip_prefix('-')?.strip_suffix(suffix)?;
        let (version, run) = middle.split_at_checked(middle.len().checked_sub(RUN)?)?;
        semver::Version::parse(version.strip_suffix('-')?).ok()?;
        Some(run.to_owned())
    };
    let mut ours: Vec<_> = names.into_iter().filter_map(|name| Some((run(&name)?, name))).collect();
    ours.sort();
    let excess = ours.len().saturating_sub(keep.max(1));
    ours.into_iter().take(excess).map(|(_, name)| name).collect()
}

/// Returns the directory that a path stands in.
pub fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// Returns the topmost directory of a path that is not there; nothing if all of them are.
pub fn topmost_missing(directory: &Path) -> Option<PathBuf> {
    directory.ancestors().take_while(|above| !above.as_os_str().is_empty() && !above.exists()).last().map(Into::into)
}

/// Makes a directory and those above it for their owner alone, durably.
///
/// # Errors
/// One cannot be made or synced.
pub fn create_directories(path: &Path) -> io::Result<()> {
    let mut missing: Vec<_> =
        path.ancestors().take_while(|above| !above.as_os_str().is_empty() && !above.exists()).collect();
    missing.reverse();
    for directory in missing {
        match DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
        sync_directory(&parent(directory))?;
    }
    Ok(())
}

/// Removes directories that were made, from the lowest up to the topmost, as long as they are empty.
///
/// # Errors
/// One cannot be removed or synced.
pub fn remove_made(lowest: &Path, topmost: Option<&Path>) -> io::Result<()> {
    let Some(topmost) = topmost else { return Ok(()) };
    for directory in lowest.ancestors().take_while(|directory| directory.starts_with(topmost)) {
        match fs::remove_dir(directory) {
            Ok(()) => sync_directory(&parent(directory))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_steps_own_old_backups_are_beyond_its_newest() {
        let runs = ["01930000-0000-7000-8000-000000000001", "01940000-0000-7000-8000-000000000001"];
        let mut names: Vec<_> = runs.iter().map(|run| format!("data-1.0.0-{run}.tar.zst")).collect();
        names.push(format!("data-more-1.0.0-{}.tar.zst", runs[0]));
        names.push("data-1.0.0-by-hand.tar.zst".to_owned());
        assert_eq!(beyond_newest(names.clone(), "data", ".tar.zst", 1), [names[0].clone()]);
        assert!(beyond_newest(names, "data", ".tar.zst", 2).is_empty());
    }
}
