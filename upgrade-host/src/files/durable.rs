//! Writes that survive a crash: whole or not at all, and on the medium when they return.

use std::fs;
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

pub(crate) use upgrade_core::durable::{
    beyond_newest, free, parent, remove_made, sync_directory, temporary, topmost_missing,
};

/// Says with which permissions and for whom a file is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Ownership {
    /// Permission bits; 0644 if absent.
    pub(crate) mode: Option<u32>,
    /// Owner and group; those of the process if absent.
    pub(crate) owner: Option<(u32, u32)>,
}

/// Replaces what stands at `path` by a file: its new content is durable before its name points to
/// it, its name when this returns. After a crash, the old or the new one stands there. The time of
/// its last modification is set too, if one is given.
pub(crate) fn replace(
    path: &Path,
    contents: &mut dyn io::Read,
    ownership: Ownership,
    modified: Option<SystemTime>,
    key: &str,
) -> io::Result<()> {
    let temporary = temporary(path, key);
    let written =
        write_temporary(&temporary, contents, ownership, modified).and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = written {
        // The first error is what matters; a temporary file that stays is replaced by the next write.
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    sync_directory(&parent(path))
}

fn write_temporary(
    temporary: &Path,
    contents: &mut dyn io::Read,
    ownership: Ownership,
    modified: Option<SystemTime>,
) -> io::Result<()> {
    match fs::remove_file(temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Private until owner and mode are what they should be: contents may be secret.
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(temporary)?;
    io::copy(contents, &mut file)?;
    if let Some((user, group)) = ownership.owner {
        std::os::unix::fs::fchown(&file, Some(user), Some(group))?;
    }
    file.set_permissions(fs::Permissions::from_mode(ownership.mode.unwrap_or(0o644)))?;
    if let Some(modified) = modified {
        file.set_modified(modified)?;
    }
    file.sync_all()
}

/// Points a symbolic link elsewhere, at once and durably; makes it if it is not there.
pub(crate) fn switch_link(link: &Path, target: &Path, key: &str) -> io::Result<()> {
    let temporary = temporary(link, key);
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::os::unix::fs::symlink(target, &temporary)?;
    fs::rename(&temporary, link)?;
    sync_directory(&parent(link))
}

/// Removes a file durably; one that is gone already is not an error.
pub(crate) fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    }
    sync_directory(&parent(path))
}

/// Makes a directory and those above it, durably; returns the topmost one that it made.
pub(crate) fn create_directories(path: &Path) -> io::Result<Option<PathBuf>> {
    let mut missing = Vec::new();
    let mut at = path.to_path_buf();
    while !at.exists() {
        missing.push(at.clone());
        if !at.pop() || at.as_os_str().is_empty() {
            break;
        }
    }
    for directory in missing.iter().rev() {
        match fs::create_dir(directory) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
        sync_directory(&parent(directory))?;
    }
    Ok(missing.pop())
}
