//! The file of a backup: written, recognised, removed.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use upgrade_core::context::{Context, OnConflict};
use upgrade_core::durable;
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::journal::cipher::Cipher;
use upgrade_core::sealed::sha256_hex;
use upgrade_core::units::Bytes;

use super::{BackupOutput, BackupUndo};
use crate::archive::{self, Header};
use crate::object::Object;

/// Asks for free space where a file is to be.
pub(super) fn expect_room(path: &Path, wanted: u64) -> Result<(), StepError> {
    let free = durable::free(path).map_err(|error| durable::failed("cannot read the free space", &error))?;
    if free > wanted {
        return Ok(());
    }
    let (below, free) = (durable::parent(path), Bytes(free));
    Err(StepError::permanent(format!("{} has {free} free, and {} are needed", below.display(), Bytes(wanted)))
        .with_hint("free some space there, or let `to` name another file system"))
}

/// Writes a backup beside its place, reads it back, and gives it its name.
pub(super) fn store(
    path: &Path,
    marker: &str,
    header: Header,
    objects: &[Object],
    cipher: Option<&Cipher>,
    free: u64,
) -> Result<BackupOutput, StepError> {
    let (parent, temporary) = (durable::parent(path), durable::temporary(path, marker));
    let contents = archive::write(header, objects, cipher)?;
    expect_room(path, contents.len() as u64 + free)?;
    let cannot = |error| durable::failed(format!("cannot make {}", path.display()), &error);
    durable::create_directories(&parent).map_err(cannot)?;
    durable::remove(&temporary).map_err(cannot)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary).map_err(cannot)?;
    file.write_all(&contents).and_then(|()| file.sync_all()).map_err(cannot)?;
    let written = fs::read(&temporary).map_err(cannot)?;
    let (header, read_back) = archive::read(&written, cipher, &temporary.display().to_string())?;
    if read_back != objects {
        return Err(StepError::permanent(format!("{} does not read back as it was written", path.display()))
            .with_hint("look at the file system and the kernel's log (`dmesg`)"));
    }
    durable::place(&temporary, path).map_err(cannot)?;
    Ok(output(path, &header, &written))
}

fn output(path: &Path, header: &Header, contents: &[u8]) -> BackupOutput {
    let (sha256, bytes) = (sha256_hex(contents), contents.len() as u64);
    BackupOutput { path: path.to_owned(), sha256, objects: header.objects, bytes }
}

/// Reads the file and makes sure that this run made it.
pub(super) fn ours(cx: &Context, undo: &BackupUndo) -> Result<BackupOutput, StepError> {
    let path = undo.path.display().to_string();
    let contents = fs::read(&undo.path).map_err(|error| durable::failed(format!("{path} cannot be read"), &error))?;
    let present = match archive::header(&contents, &path) {
        Ok((header, _)) if header.made_by == cx.marker() => return Ok(output(&undo.path, &header, &contents)),
        Ok((header, _)) => format!("a backup made by {}", header.made_by),
        Err(error) => error.message().to_owned(),
    };
    Err(StepError::conflict(Conflict {
        subject: path,
        found: "nothing".to_owned(),
        intended: format!("a backup made by {}", cx.marker()),
        present,
    }))
}

/// Removes what an interrupted call left beside the place.
pub(super) fn clear(cx: &Context, undo: &BackupUndo) -> Result<(), StepError> {
    let temporary = durable::temporary(&undo.path, &cx.marker());
    durable::remove(&temporary).map_err(|error| cannot_remove(&temporary, &error))
}

fn cannot_remove(path: &Path, error: &std::io::Error) -> StepError {
    durable::failed(format!("cannot remove {}", path.display()), error)
}

/// Removes the backup that this run made, and the directories made for it.
pub(super) fn remove(cx: &Context, undo: &BackupUndo) -> Result<(), StepError> {
    let cannot = |error| cannot_remove(&undo.path, &error);
    if undo.path.symlink_metadata().is_ok() {
        if cx.on_conflict() != OnConflict::Overwrite {
            ours(cx, undo)?;
        }
        durable::remove(&undo.path).map_err(cannot)?;
    }
    durable::remove_made(&durable::parent(&undo.path), undo.made.as_deref()).map_err(cannot)
}

/// Removes this step's oldest backups beyond `keep`, and no other file.
pub(super) fn prune(cx: &Context, undo: &BackupUndo, suffix: &str, keep: usize) -> Result<(), StepError> {
    let directory = durable::parent(&undo.path);
    let cannot = |error| durable::failed(format!("cannot remove old backups in {}", directory.display()), &error);
    let listing = fs::read_dir(&directory).map_err(cannot)?;
    let names = listing.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    for name in durable::beyond_newest(names, cx.subject(), suffix, keep) {
        let path = directory.join(name);
        if path != undo.path {
            durable::remove(&path).map_err(cannot)?;
        }
    }
    Ok(())
}
