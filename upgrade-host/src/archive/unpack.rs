//! Unpacks an archive into a fresh directory, or only reads what it would unpack to.
//!
//! No entry is written through a link: every directory above an entry is one that the archive, or
//! this module, made as a directory. The place must be new and private, so that nobody else makes
//! links in it meanwhile.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tar::EntryType;
use upgrade_core::context::Context;
use upgrade_core::sealed::hex;

use super::manifest::{Entry, Kind, Manifest, RawPath};
use super::name::{self, Names};
use super::reader::{Member, Reader};
use super::{ArchiveError, Limits, watch};

/// Says what is accepted and what becomes of it.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    pub(crate) limits: Limits,
    pub(crate) names: Names,
    /// Whether links may point out of the tree, and setuid bits and owners are kept: a backup
    /// restores what was there, a release brings nothing of the kind.
    pub(crate) faithful: bool,
    /// How many leading components of each name are dropped.
    pub(crate) strip: usize,
    /// Takes only what has these leading components.
    pub(crate) only: Vec<Vec<u8>>,
    /// Reads this member into memory instead of unpacking it.
    pub(crate) aside: Option<&'static str>,
}

impl Rules {
    /// Accepts what a release may hold.
    pub(crate) fn release(limits: Limits, strip: usize) -> Self {
        Self { limits, names: Names::Plain, faithful: false, strip, only: Vec::new(), aside: None }
    }
}

/// Holds what an archive was found to hold, when all of it had been read.
#[derive(Debug)]
pub(crate) struct Contents {
    pub(crate) manifest: Manifest,
    /// SHA-256 of the packed file.
    pub(crate) sha256: String,
    pub(crate) aside: Option<Vec<u8>>,
}

/// The most that a member read into memory may hold.
const ASIDE: u64 = 512 << 20;

/// Reads an archive to its end, checks every entry and unpacks below `into`, if it is given.
///
/// # Errors
/// The first entry that is refused ends it: the caller removes what was unpacked.
pub(crate) fn unpack(
    archive: &Path,
    rules: &Rules,
    into: Option<&Path>,
    cx: &Context,
) -> Result<Contents, ArchiveError> {
    let mut reader = Reader::open(archive, rules.limits)?;
    let mut unpacking = Unpacking { rules, into, made: BTreeMap::new(), explicit: 0, aside: None };
    while let Some(member) = reader.next()? {
        unpacking.take(&mut reader, &member, cx)?;
    }
    let manifest = Manifest::new(unpacking.made.into_values().collect());
    if let Some(into) = into {
        super::tree::dress(into, &manifest)?;
    }
    Ok(Contents { manifest, sha256: reader.sha256(), aside: unpacking.aside })
}

struct Unpacking<'a> {
    rules: &'a Rules,
    into: Option<&'a Path>,
    made: BTreeMap<PathBuf, Entry>,
    explicit: usize,
    aside: Option<Vec<u8>>,
}

impl Unpacking<'_> {
    fn take(&mut self, reader: &mut Reader, member: &Member, cx: &Context) -> Result<(), ArchiveError> {
        let refused = |reader: &Reader, reason: &str| ArchiveError::Refused {
            archive: reader.archive().to_path_buf(),
            entry: String::from_utf8_lossy(&member.name).escape_debug().take(200).collect(),
            reason: reason.to_owned(),
        };
        self.explicit += 1;
        if self.explicit > self.rules.limits.entries {
            return Err(refused(reader, &format!("it is one more than {} entries", self.rules.limits.entries)));
        }
        let (done, total) = reader.position();
        watch(cx, done, total, "unpacking")?;
        let parts = name::components(&member.name, self.rules.names).map_err(|reason| refused(reader, reason))?;
        if self.rules.aside.is_some_and(|aside| parts == [aside.as_bytes()]) {
            if self.aside.is_some() {
                return Err(refused(reader, "it is there twice"));
            }
            self.aside = Some(reader.read_all(ASIDE)?);
            return Ok(());
        }
        if !parts.starts_with(&self.rules.only) {
            return Ok(());
        }
        let directory = member.kind.is_dir() || (member.kind.is_file() && member.name.ends_with(b"/"));
        if parts.len() <= self.rules.strip {
            let lost = "`strip_components` would leave nothing of its name";
            return if directory { Ok(()) } else { Err(refused(reader, lost)) };
        }
        let parts = &parts[self.rules.strip..];
        let path = name::join(parts);
        if let Some(reason) = self.make_ancestors(&path)? {
            return Err(refused(reader, &reason));
        }
        match self.made.get(&path) {
            // Made on the way to an entry below it, before its own entry came.
            Some(there) if directory && there.kind == Kind::Directory && there.mtime.is_none() => {}
            Some(_) => return Err(refused(reader, "it is there twice")),
            None => {}
        }
        let mut entry = Entry {
            path: RawPath::of(&path),
            kind: Kind::File,
            mode: member.mode & if self.rules.faithful { 0o7777 } else { 0o777 },
            size: None,
            sha256: None,
            target: None,
            owner: self.rules.faithful.then_some(member.owner),
            mtime: Some((member.mtime, 0)),
        };
        match member.kind {
            _ if directory => {
                if !self.made.contains_key(&path) {
                    self.make_directory(&path)?;
                }
                entry.kind = Kind::Directory;
            }
            EntryType::Regular | EntryType::Continuous => {
                let (sha256, size) = self.write(reader, &path, cx)?;
                (entry.sha256, entry.size) = (Some(sha256), Some(size));
            }
            EntryType::Symlink => {
                let leaves = name::link_leaves(&member.link, parts.len() - 1);
                if let Some(reason) = leaves.filter(|_| !self.rules.faithful) {
                    return Err(refused(reader, reason));
                }
                (entry.kind, entry.mode) = (Kind::Symlink, 0o777);
                entry.target = Some(RawPath(member.link.clone()));
                if let Some(into) = self.into {
                    let link = into.join(&path);
                    std::os::unix::fs::symlink(RawPath(member.link.clone()).as_path(), &link)
                        .map_err(ArchiveError::io("make", &link))?;
                }
            }
            EntryType::Link => {
                let target = name::components(&member.link, self.rules.names)
                    .map_err(|_| refused(reader, "it is a hard link that leads outside"))?;
                let target = name::join(target.get(self.rules.strip..).unwrap_or_default());
                let Some(of) = self.made.get(&target).filter(|of| of.kind == Kind::File) else {
                    return Err(refused(reader, "it is a hard link to something that is not a file before it"));
                };
                entry = Entry { path: entry.path, ..of.clone() };
                if let Some(into) = self.into {
                    let link = into.join(&path);
                    fs::hard_link(into.join(&target), &link).map_err(ArchiveError::io("make", &link))?;
                }
            }
            kind => {
                let what = match kind {
                    EntryType::Char | EntryType::Block => "it is a device",
                    EntryType::Fifo => "it is a named pipe",
                    EntryType::GNUSparse => "it is a sparse file: build the archive without --sparse",
                    _ => "it is of a type that is not known",
                };
                return Err(refused(reader, what));
            }
        }
        self.made.insert(path, entry);
        Ok(())
    }

    /// Makes the directories above `path` that no entry has made; says why it cannot be there.
    fn make_ancestors(&mut self, path: &Path) -> Result<Option<String>, ArchiveError> {
        let mut missing = Vec::new();
        for above in path.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty()) {
            match self.made.get(above) {
                Some(entry) if entry.kind == Kind::Directory => break,
                Some(_) => return Ok(Some(format!("`{}` above it is not a directory", above.display()))),
                None => missing.push(above.to_path_buf()),
            }
        }
        for above in missing.into_iter().rev() {
            self.make_directory(&above)?;
            let entry = Entry {
                path: RawPath::of(&above),
                kind: Kind::Directory,
                mode: 0o755,
                size: None,
                sha256: None,
                target: None,
                owner: None,
                mtime: None,
            };
            self.made.insert(above, entry);
            if self.made.len() > self.rules.limits.entries {
                return Ok(Some(format!(
                    "the directories above it make more than {} entries",
                    self.rules.limits.entries
                )));
            }
        }
        Ok(None)
    }

    fn make_directory(&self, path: &Path) -> Result<(), ArchiveError> {
        let Some(into) = self.into else { return Ok(()) };
        let directory = into.join(path);
        // Private and writable until all is unpacked; it is given its own mode at the end.
        fs::DirBuilder::new().mode(0o700).create(&directory).map_err(ArchiveError::io("make", &directory))
    }

    fn write(&self, reader: &mut Reader, path: &Path, cx: &Context) -> Result<(String, u64), ArchiveError> {
        let path = self.into.map(|into| into.join(path));
        let mut file = match &path {
            Some(path) => Some(create(path)?),
            None => None,
        };
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 128 << 10];
        let mut size = 0;
        loop {
            let read = reader.read(&mut buffer)?;
            if read == 0 {
                return Ok((hex(&hasher.finalize()), size));
            }
            hasher.update(&buffer[..read]);
            size += read as u64;
            if let (Some(file), Some(path)) = (&mut file, &path) {
                file.write_all(&buffer[..read]).map_err(ArchiveError::io("write", path))?;
            }
            if size % (1 << 20) < read as u64 {
                let (done, total) = reader.position();
                watch(cx, done, total, "unpacking")?;
            }
        }
    }
}

fn create(path: &Path) -> Result<File, ArchiveError> {
    fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(ArchiveError::io("make", path))
}

/// Makes a new private directory to unpack into; what an interrupted call left there is removed.
pub(crate) fn fresh_directory(path: &Path) -> Result<(), ArchiveError> {
    super::tree::remove(path)?;
    fs::DirBuilder::new().mode(0o700).create(path).map_err(ArchiveError::io("make", path))
}
