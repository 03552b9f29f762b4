//! Requests to drivers: one file each, there entirely or not at all.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::lease::file_name;
use super::run::write_durably;
use super::scan::damaged;
use super::{storage, sync_directory};
use crate::entry::Request;
use crate::journal::JournalError;

/// Leaves a request in a directory.
pub(super) fn post(directory: &Path, request: &Request) -> Result<(), JournalError> {
    make_directory(directory)?;
    let path = path_of(directory, &request.id);
    let contents = serde_json::to_vec(request).map_err(io::Error::from).map_err(storage("write", &path))?;
    write_durably(&path, &contents)
}

/// Reads the requests of a directory, sorted by id, which is by time.
pub(super) fn list(directory: &Path) -> Result<Vec<Request>, JournalError> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(storage("read", directory)(error)),
    };
    let mut requests = Vec::new();
    for entry in entries {
        let path = entry.map_err(storage("read", directory))?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        match std::fs::read(&path) {
            Ok(contents) => requests.push(
                serde_json::from_slice::<Request>(&contents)
                    .map_err(|error| damaged(&path.display().to_string(), 1, format!("not a request: {error}")))?,
            ),
            // Withdrawn since the directory was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(storage("read", &path)(error)),
        }
    }
    requests.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(requests)
}

/// Removes a request.
pub(super) fn withdraw(directory: &Path, id: &str) -> Result<(), JournalError> {
    let path = path_of(directory, id);
    match std::fs::remove_file(&path) {
        Ok(()) => sync_directory(directory),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(storage("remove", &path)(error)),
    }
}

/// Makes a directory that only its owner can enter, durably.
pub(super) fn make_directory(path: &Path) -> Result<(), JournalError> {
    if path.is_dir() {
        return Ok(());
    }
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(storage("create", path))?;
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).map_or(Ok(()), sync_directory)
}

fn path_of(directory: &Path, id: &str) -> PathBuf {
    // An id is whatever its maker wrote: it must not lead out of the directory.
    directory.join(format!("{}.json", file_name(id)))
}
