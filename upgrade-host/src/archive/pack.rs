//! Packs trees into a `tar.zst` that proves itself: its last member lists every entry's digest.
//!
//! A file that changes while it is read must leave nothing behind. A small one is read whole before
//! a byte of it is written; a large one starts a zstd frame of its own, so that the archive can be
//! cut back to where the frame began.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};
use upgrade_core::context::Context;
use upgrade_core::sealed::hex;

use super::frames::Frames;
use super::manifest::{Entry, Kind, Manifest, RawPath};
use super::{ArchiveError, tree, watch};

/// The member that lists the others; it is the last one.
pub(crate) const MANIFEST: &str = "manifest.json";
/// The directory that every other member is below, so that none can be taken for the manifest.
pub(crate) const FILES: &str = "files";
/// The member that names the paths that were asked for; it is the first one, so that a restore
/// knows what it changes without reading the rest.
pub(crate) const ROOTS: &str = "roots.json";
/// What is read whole before it is written.
const SMALL: u64 = 4 << 20;
const ATTEMPTS: u32 = 3;

/// Lists what a backup holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BackupManifest {
    pub(crate) format: u32,
    /// The run and the step that made it.
    pub(crate) made_by: String,
    pub(crate) created: String,
    /// The paths that were asked for, absolute.
    pub(crate) roots: Vec<RawPath>,
    /// Sockets, pipes and devices, which are not kept.
    pub(crate) skipped: Vec<RawPath>,
    /// What was there when the backup began, and removed before it was read.
    #[serde(default)]
    pub(crate) vanished: Vec<RawPath>,
    /// The entries, with paths from the root directory on.
    pub(crate) tree: Manifest,
}

/// Collects what is to be packed: relative paths from the root directory on, parents first.
pub(crate) struct Selection {
    pub(crate) paths: Vec<PathBuf>,
    pub(crate) skipped: Vec<RawPath>,
    pub(crate) bytes: u64,
}

/// Walks the roots and leaves out what `excluded` names.
pub(crate) fn select(
    roots: &[PathBuf],
    excluded: &dyn Fn(&Path) -> bool,
    cx: &Context,
) -> Result<Selection, ArchiveError> {
    let mut selection = Selection { paths: Vec::new(), skipped: Vec::new(), bytes: 0 };
    let mut waiting: Vec<PathBuf> = roots.iter().rev().cloned().collect();
    while let Some(path) = waiting.pop() {
        watch(cx, selection.paths.len() as u64, 0, "looking at what is to be kept")?;
        if excluded(&path) {
            continue;
        }
        let metadata = match path.symlink_metadata() {
            // Gone since its directory was listed; a root that is not there is an error.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !roots.contains(&path) => continue,
            other => other.map_err(ArchiveError::io("read", &path))?,
        };
        let entry = tree::bare(&path, &metadata);
        match entry.kind {
            Kind::Special => {
                tracing::warn!(path = %path.display(), "a socket, pipe or device is not backed up");
                selection.skipped.push(entry.path);
                continue;
            }
            Kind::Directory => {
                let listing = fs::read_dir(&path).map_err(ArchiveError::io("list", &path))?;
                let mut names = listing
                    .map(|child| child.map(|child| child.path()))
                    .collect::<io::Result<Vec<_>>>()
                    .map_err(ArchiveError::io("list", &path))?;
                names.sort_by(|a, b| b.cmp(a));
                waiting.extend(names);
            }
            Kind::File => selection.bytes += metadata.len(),
            Kind::Symlink => {}
        }
        selection.paths.push(path);
    }
    Ok(selection)
}

/// Writes the backup, private and durable, under a name that is its own until it is proven.
///
/// # Errors
/// A file that changes each time it is read, named; the file system's own. The caller removes what
/// was written.
pub(crate) fn pack(
    to: &Path,
    selection: &Selection,
    mut manifest: BackupManifest,
    level: i32,
    cx: &Context,
) -> Result<BackupManifest, ArchiveError> {
    tree::remove(to)?;
    let file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)
        .map_err(ArchiveError::io("make", to))?;
    let frames = Frames::new(file, level).map_err(ArchiveError::io("write", to))?;
    let mut packing = Packing { to, archive: Builder::new(frames), done: 0, total: selection.bytes, cx };
    packing.add_json(ROOTS, &manifest.roots)?;
    let mut entries = Vec::new();
    for path in &selection.paths {
        watch(cx, packing.done, packing.total, "backing up")?;
        match packing.add(path)? {
            Some(entry) => entries.push(entry),
            None => {
                tracing::warn!(path = %path.display(), "it was removed while the backup was made: it is not in it");
                manifest.vanished.push(RawPath::of(path));
            }
        }
    }
    manifest.tree = Manifest::new(entries);
    packing.add_json(MANIFEST, &manifest)?;
    let frames = packing.archive.into_inner().map_err(ArchiveError::io("write", to))?;
    let file = frames.finish().map_err(ArchiveError::io("write", to))?;
    file.sync_all().map_err(ArchiveError::io("make durable", to))?;
    // Read back from the medium, not from what the kernel remembers of it; only advice.
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
    Ok(manifest)
}

struct Packing<'a> {
    to: &'a Path,
    archive: Builder<Frames>,
    done: u64,
    total: u64,
    cx: &'a Context,
}

impl Packing<'_> {
    fn add(&mut self, path: &Path) -> Result<Option<Entry>, ArchiveError> {
        for _ in 0..ATTEMPTS {
            let metadata = match path.symlink_metadata() {
                // Removed since it was listed: what is not there is not part of the state kept.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                other => other.map_err(ArchiveError::io("read", path))?,
            };
            let relative = path.strip_prefix("/").unwrap_or(path);
            let mut entry = tree::bare(relative, &metadata);
            let name = Path::new(FILES).join(relative);
            let mut header = header_of(&entry);
            let written = match entry.kind {
                Kind::Directory => self.archive.append_data(&mut header, &name, io::empty()),
                Kind::Symlink => {
                    let target = fs::read_link(path).map_err(ArchiveError::io("read", path))?;
                    entry.target = Some(RawPath::of(&target));
                    self.archive.append_link(&mut header, &name, &target)
                }
                Kind::File => {
                    header.set_size(metadata.len());
                    entry.size = Some(metadata.len());
                    match self.add_file(path, &metadata, &mut header, &name)? {
                        Some(sha256) => entry.sha256 = Some(sha256),
                        None => continue,
                    }
                    Ok(())
                }
                Kind::Special => return Err(ArchiveError::Changing { path: path.into() }),
            };
            written.map_err(ArchiveError::io("write", self.to))?;
            return Ok(Some(entry));
        }
        Err(ArchiveError::Changing { path: path.into() })
    }

    /// Adds a file and returns its digest; `None`, and nothing added, if it changed meanwhile.
    fn add_file(
        &mut self,
        path: &Path,
        before: &Metadata,
        header: &mut Header,
        name: &Path,
    ) -> Result<Option<String>, ArchiveError> {
        let mut file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(ArchiveError::io("open", path))?,
        };
        let started = self.done;
        if before.len() <= SMALL {
            let mut contents = Vec::new();
            let mut bounded = (&mut file).take(before.len() + 1);
            bounded.read_to_end(&mut contents).map_err(ArchiveError::io("read", path))?;
            if contents.len() as u64 != before.len() || changed(path, &file, before) {
                return Ok(None);
            }
            self.archive.append_data(header, name, &*contents).map_err(ArchiveError::io("write", self.to))?;
            self.done += before.len();
            return Ok(Some(hex(&Sha256::digest(&contents))));
        }
        let start = self.archive.get_mut().cut().map_err(ArchiveError::io("write", self.to))?;
        let mut source =
            Source { packing: self.cx, file: &mut file, hasher: Sha256::new(), left: before.len(), failed: None };
        let (done, total) = (self.done, self.total);
        source.report(done, total);
        let appended = self.archive.append_data(header, name, &mut source);
        let (digest, left, failed) = (hex(&source.hasher.finalize()), source.left, source.failed);
        if self.cx.cancelled().is_cancelled() {
            return Err(ArchiveError::Cancelled);
        }
        if let Some(source) = failed {
            return Err(ArchiveError::Io { action: "read", path: path.into(), source });
        }
        appended.map_err(ArchiveError::io("write", self.to))?;
        if left > 0 || changed(path, &file, before) {
            self.archive.get_mut().back_to(start).map_err(ArchiveError::io("write", self.to))?;
            self.done = started;
            return Ok(None);
        }
        self.done += before.len();
        watch(self.cx, self.done, self.total, "backing up")?;
        Ok(Some(digest))
    }

    fn add_json(&mut self, name: &str, value: &impl Serialize) -> Result<(), ArchiveError> {
        let text = serde_json::to_vec(value).expect("a manifest holds nothing that JSON cannot");
        let mut header = Header::new_gnu();
        header.set_mode(0o600);
        header.set_size(text.len() as u64);
        self.archive.append_data(&mut header, name, &*text).map_err(ArchiveError::io("write", self.to))
    }
}

/// Reads exactly as much of a file as its header promised, padding what is missing: the caller
/// cuts the archive back then.
struct Source<'a> {
    packing: &'a Context,
    file: &'a mut File,
    hasher: Sha256,
    left: u64,
    failed: Option<io::Error>,
}

impl Source<'_> {
    fn report(&self, done: u64, total: u64) {
        self.packing.progress(done, total, "backing up");
    }
}

impl Read for Source<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.packing.cancelled().is_cancelled() {
            return Err(io::Error::other("cancelled"));
        }
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = match self.file.read(&mut buffer[..most]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Err(error),
            Err(error) => {
                self.failed = Some(error);
                return Err(io::Error::other("the file cannot be read"));
            }
            Ok(read) => read,
        };
        self.hasher.update(&buffer[..read]);
        self.left -= read as u64;
        Ok(read)
    }
}

fn changed(path: &Path, file: &File, before: &Metadata) -> bool {
    let mark = |m: &Metadata| (m.dev(), m.ino(), m.len(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec());
    let same = |now: io::Result<Metadata>| now.is_ok_and(|now| mark(&now) == mark(before));
    !(same(file.metadata()) && same(path.symlink_metadata()))
}

fn header_of(entry: &Entry) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(match entry.kind {
        Kind::Directory => EntryType::Directory,
        Kind::Symlink => EntryType::Symlink,
        Kind::File | Kind::Special => EntryType::Regular,
    });
    header.set_mode(entry.mode);
    header.set_size(0);
    if let Some((user, group)) = entry.owner {
        header.set_uid(user.into());
        header.set_gid(group.into());
    }
    // A time before 1970 is in the manifest alone: a tar header cannot hold it.
    header.set_mtime(entry.mtime.and_then(|(seconds, _)| u64::try_from(seconds).ok()).unwrap_or(0));
    header
}
