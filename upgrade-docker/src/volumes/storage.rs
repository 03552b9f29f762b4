//! Files of this machine that survive a crash: private, durable, and complete before they have a name.

use std::fs;
use std::io;
use std::path::Path;

use rustix::fs::{CWD, RenameFlags};
pub(crate) use upgrade_core::durable::{
    create_directories, failed, free, parent, remove_made, sync_directory, temporary, topmost_missing,
};

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
