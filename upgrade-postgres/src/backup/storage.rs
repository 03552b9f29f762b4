//! Files and directories that survive a crash: private, durable, and complete before they have a name.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

pub(crate) use upgrade_core::durable::{
    create_directories, failed, free, parent, remove_made, sync_directory, temporary, topmost_missing,
};
use upgrade_core::error::StepError;
use upgrade_core::units::Bytes;

/// Makes a directory anew: what an interrupted call left in its place is removed.
pub(crate) fn fresh_directory(path: &Path) -> io::Result<()> {
    remove(path)?;
    DirBuilder::new().mode(0o700).create(path)
}

/// Removes a file or a directory with all that is in it; one that is gone already is no error.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let removed = match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => other?,
    }
    sync_directory(&parent(path))
}

/// Removes the backup at `path`: its name first, at once, so that no half of it is ever met.
pub(crate) fn remove_backup(path: &Path, key: &str) -> io::Result<()> {
    let aside = temporary(path, key);
    match fs::rename(path, &aside) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => other?,
    }
    remove(&aside)
}

/// Lists the files below a directory, each path from that directory, in order.
pub(crate) fn files_below(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![PathBuf::new()];
    while let Some(below) = open.pop() {
        for entry in fs::read_dir(directory.join(&below))? {
            let entry = entry?;
            let path = below.join(entry.file_name());
            if entry.file_type()?.is_dir() { open.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    Ok(found)
}

/// Makes every file below a directory durable and its owner's alone, and the names of all.
pub(crate) fn make_durable(directory: &Path) -> io::Result<()> {
    for path in files_below(directory)? {
        let file = File::open(directory.join(&path))?;
        file.set_permissions(fs::Permissions::from_mode(0o600))?;
        file.sync_all()?;
    }
    let mut open = vec![directory.to_owned()];
    while let Some(at) = open.pop() {
        fs::set_permissions(&at, fs::Permissions::from_mode(0o700))?;
        sync_directory(&at)?;
        for entry in fs::read_dir(&at)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                open.push(entry.path());
            }
        }
    }
    Ok(())
}

/// Says that there is not enough room.
pub(crate) fn no_room(what: &str, needed: u64, path: &Path, free: u64) -> StepError {
    StepError::permanent(format!(
        "{what} may need {} below {}, which has {} free",
        Bytes(needed),
        parent(path).display(),
        Bytes(free)
    ))
    .with_hint("free some space there, or name a directory on another file system")
}
