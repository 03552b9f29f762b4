//! Trees on the disk: surveyed, given their attributes, swapped into place, removed.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, RenameFlags, Timespec, Timestamps, UTIME_OMIT};
use sha2::{Digest, Sha256};
use upgrade_core::context::Context;
use upgrade_core::sealed::hex;

use super::manifest::{Entry, Kind, Manifest, RawPath};
use super::{ArchiveError, watch};
use crate::files::durable;

/// Describes `base/start` and all below it, with paths relative to `base`; without `start`, all
/// below `base`. What is not there has no entries.
pub(crate) fn survey(base: &Path, start: Option<&Path>, cx: &Context) -> Result<Manifest, ArchiveError> {
    let mut entries = Vec::new();
    let mut waiting = match start {
        Some(start) => vec![start.to_path_buf()],
        None => children(base, Path::new(""))?,
    };
    while let Some(relative) = waiting.pop() {
        if let Some(entry) = describe(base, &relative, cx)? {
            if entry.kind == Kind::Directory {
                waiting.extend(children(base, &relative)?);
            }
            entries.push(entry);
        }
        watch(cx, entries.len() as u64, 0, "reading what is there")?;
    }
    Ok(Manifest::new(entries))
}

fn children(base: &Path, relative: &Path) -> Result<Vec<std::path::PathBuf>, ArchiveError> {
    let directory = base.join(relative);
    let listing = match fs::read_dir(&directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(ArchiveError::io("list", &directory))?,
    };
    listing
        .map(|entry| entry.map(|entry| relative.join(entry.file_name())).map_err(ArchiveError::io("list", &directory)))
        .collect()
}

/// Describes one entry; `None` if it is gone: a running service removes files at any time.
fn describe(base: &Path, relative: &Path, cx: &Context) -> Result<Option<Entry>, ArchiveError> {
    let path = base.join(relative);
    let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let metadata = match path.symlink_metadata() {
        Err(error) if gone(&error) => return Ok(None),
        other => other.map_err(ArchiveError::io("read", &path))?,
    };
    let mut entry = bare(relative, &metadata);
    match entry.kind {
        Kind::File => match digest(&path, cx) {
            Err(ArchiveError::Io { source, .. }) if gone(&source) => return Ok(None),
            other => {
                let (sha256, size) = other?;
                (entry.sha256, entry.size) = (Some(sha256), Some(size));
            }
        },
        Kind::Symlink => match fs::read_link(&path) {
            Err(error) if gone(&error) => return Ok(None),
            other => entry.target = Some(RawPath::of(&other.map_err(ArchiveError::io("read", &path))?)),
        },
        Kind::Directory | Kind::Special => {}
    }
    Ok(Some(entry))
}

/// Describes an entry as far as its metadata does.
pub(crate) fn bare(relative: &Path, metadata: &Metadata) -> Entry {
    let of = metadata.file_type();
    let special = of.is_socket() || of.is_fifo() || of.is_block_device() || of.is_char_device();
    Entry {
        path: RawPath::of(relative),
        kind: match () {
            () if of.is_dir() => Kind::Directory,
            () if of.is_symlink() => Kind::Symlink,
            () if special => Kind::Special,
            () => Kind::File,
        },
        mode: metadata.mode() & 0o7777,
        size: None,
        sha256: None,
        target: None,
        owner: Some((metadata.uid(), metadata.gid())),
        mtime: Some((metadata.mtime(), metadata.mtime_nsec().try_into().unwrap_or(0))),
    }
}

/// Returns a file's SHA-256 and length, in one pass.
pub(crate) fn digest(path: &Path, cx: &Context) -> Result<(String, u64), ArchiveError> {
    let mut file = File::open(path).map_err(ArchiveError::io("open", path))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 128 << 10];
    let mut length = 0;
    loop {
        let read = file.read(&mut buffer).map_err(ArchiveError::io("read", path))?;
        if read == 0 {
            return Ok((hex(&hasher.finalize()), length));
        }
        hasher.update(&buffer[..read]);
        length += read as u64;
        if cx.cancelled().is_cancelled() {
            return Err(ArchiveError::Cancelled);
        }
    }
}

/// Gives every entry below `base` the mode, and where the manifest names them the owner and the
/// time of modification; children first, because writing in a directory changes its time.
pub(crate) fn dress(base: &Path, manifest: &Manifest) -> Result<(), ArchiveError> {
    for entry in manifest.entries.iter().rev() {
        let path = base.join(entry.path.as_path());
        if let Some(owner) = entry.owner {
            let now = path.symlink_metadata().map_err(ArchiveError::io("read", &path))?;
            if (now.uid(), now.gid()) != owner {
                std::os::unix::fs::lchown(&path, Some(owner.0), Some(owner.1))
                    .map_err(ArchiveError::io("give its owner to", &path))?;
            }
        }
        if entry.kind != Kind::Symlink {
            // After the owner: changing it clears the set-user-id bit.
            fs::set_permissions(&path, fs::Permissions::from_mode(entry.mode))
                .map_err(ArchiveError::io("give its mode to", &path))?;
        }
        if let Some((seconds, nanoseconds)) = entry.mtime {
            let times = Timestamps {
                last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
                last_modification: Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() },
            };
            rustix::fs::utimensat(CWD, &path, &times, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|error| ArchiveError::io("give its time to", &path)(error.into()))?;
        }
    }
    Ok(())
}

/// Makes everything written below a directory durable: one call for the whole file system, where
/// one for each file would wait for the medium thousands of times.
pub(crate) fn sync(directory: &Path) -> Result<(), ArchiveError> {
    let opened = File::open(directory).map_err(ArchiveError::io("open", directory))?;
    rustix::fs::syncfs(&opened).map_err(|error| ArchiveError::io("make durable", directory)(error.into()))
}

/// Moves a tree to a name that nobody has, durably.
pub(crate) fn place(from: &Path, to: &Path) -> Result<(), ArchiveError> {
    let renamed = match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // A file system without the flag: the look and the move are then two calls.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => match to.symlink_metadata() {
            Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
            Err(_) => fs::rename(from, to),
        },
        other => other.map_err(io::Error::from),
    };
    renamed.map_err(ArchiveError::io("move into place", to))?;
    for parent in [durable::parent(to), durable::parent(from)] {
        durable::sync_directory(&parent).map_err(ArchiveError::io("make durable", &parent))?;
    }
    Ok(())
}

/// Removes a file or a tree; what is gone already is not an error, and links are not followed.
pub(crate) fn remove(path: &Path) -> Result<(), ArchiveError> {
    let removed = match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => Err(error),
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    };
    removed.map_err(ArchiveError::io("remove", path))?;
    let parent = durable::parent(path);
    durable::sync_directory(&parent).map_err(ArchiveError::io("make durable", &parent))
}

/// Removes the directories that a step made, as [`durable::remove_made`] does.
pub(crate) fn remove_made(lowest: &Path, topmost: Option<&Path>) -> Result<(), ArchiveError> {
    match topmost {
        Some(topmost) => durable::remove_made(lowest, Some(topmost)).map_err(ArchiveError::io("remove", topmost)),
        None => Ok(()),
    }
}

/// Tells how many bytes are free for this process on the file system that a path is, or will be, on.
pub(crate) fn free(path: &Path) -> Result<u64, ArchiveError> {
    durable::free(path).map_err(ArchiveError::io("read the free space of", path))
}
