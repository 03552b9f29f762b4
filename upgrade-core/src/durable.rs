//! Names and directories that survive a crash: what every adapter that keeps files writes with.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

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
