//! The directory that an image is built from, as it is sent to an engine.

use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::sealed::hex;

use super::ignored::Ignored;
use crate::error::cancelled;
use crate::streams::GONE;
use crate::volumes::contents::watch;
use crate::volumes::storage;

/// The file that says what is not sent.
const IGNORE: &str = ".dockerignore";

/// Names a directory and the Dockerfile in it.
#[derive(Debug, Clone)]
pub(crate) struct Directory {
    pub(crate) root: PathBuf,
    pub(crate) dockerfile: String,
}

/// Counts what is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) files: u64,
    pub(crate) bytes: u64,
    /// SHA-256 of names, kinds, modes and contents; not of times, which no build looks at.
    pub(crate) sha256: String,
}

impl Directory {
    /// Reads the Dockerfile.
    ///
    /// # Errors
    /// There is none, or it is no text.
    pub(crate) fn dockerfile(&self) -> Result<String, StepError> {
        let path = self.root.join(&self.dockerfile);
        fs::read_to_string(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound if self.root.is_dir() => {
                StepError::permanent(format!("there is no Dockerfile at {}", path.display()))
                    .with_hint("name it with `build.dockerfile`, from the directory `build.context` on")
            }
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                StepError::permanent(format!("there is no directory {}", self.root.display()))
                    .with_hint("`build.context` names the directory that the image is built from")
            }
            _ => storage::failed(format!("cannot read {}", path.display()), &error),
        })
    }

    /// Writes what the directory holds as a tar, in order of the names.
    ///
    /// Modes, links and times are kept; all belongs to root, as the `docker` command sends it.
    ///
    /// # Errors
    /// Something cannot be read, or changes while it is.
    pub(crate) fn send(&self, to: &mut dyn Write, cx: &Context) -> Result<Sent, StepError> {
        let text = match fs::read_to_string(self.root.join(IGNORE)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            read => read.map_err(|error| storage::failed(format!("cannot read {IGNORE}"), &error))?,
        };
        let ignored = Ignored::parse(&text, &[&self.dockerfile, IGNORE]).map_err(|wrong| {
            StepError::permanent(format!("{} cannot be read: {wrong}", self.root.join(IGNORE).display()))
                .with_hint("each line is a pattern; a backslash before `[`, `*` or `?` takes it for itself")
        })?;
        let sent = Sent { files: 0, bytes: 0, sha256: String::new() };
        let mut walk = Walk {
            root: &self.root,
            ignored,
            archive: Builder::new(to),
            hasher: Sha256::new(),
            sent,
            above: Vec::new(),
            cx,
        };
        let walked = walk.directory(Path::new("")).and_then(|()| walk.archive.finish());
        walked.map_err(|error| match error.kind() {
            _ if cx.cancelled().is_cancelled() => cancelled(),
            io::ErrorKind::BrokenPipe => StepError::unknown(GONE),
            io::ErrorKind::UnexpectedEof => {
                StepError::transient(format!("{} changed while it was sent", self.root.display()))
                    .with_cause(&error)
                    .with_hint(format!("name what is written meanwhile in {IGNORE}, then try again"))
            }
            _ => storage::failed(format!("cannot read {}", self.root.display()), &error),
        })?;
        walk.sent.sha256 = hex(&walk.hasher.finalize());
        Ok(walk.sent)
    }
}

struct Walk<'a, W: Write> {
    root: &'a Path,
    ignored: Ignored,
    archive: Builder<W>,
    hasher: Sha256,
    sent: Sent,
    /// Directories that are left out, sent as soon as something below them is.
    above: Vec<(PathBuf, Metadata)>,
    cx: &'a Context,
}

impl<W: Write> Walk<'_, W> {
    fn directory(&mut self, below: &Path) -> io::Result<()> {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", below.display()));
        let listed = fs::read_dir(self.root.join(below)).map_err(named)?;
        let mut names = listed.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()?;
        names.sort_unstable();
        for name in names {
            let path = below.join(name);
            let found = fs::symlink_metadata(self.root.join(&path))?;
            let left_out = self.ignored.leaves_out(&path.to_string_lossy());
            if found.is_dir() {
                if left_out && !self.ignored.takes_back() {
                    continue;
                }
                self.above.push((path.clone(), found));
                if !left_out {
                    self.parents()?;
                }
                self.directory(&path)?;
                if self.above.last().is_some_and(|(above, _)| *above == path) {
                    self.above.pop();
                }
            } else if !left_out && !found.file_type().is_socket() {
                self.parents()?;
                self.entry(&path, &found)
                    .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
            }
        }
        Ok(())
    }

    fn parents(&mut self) -> io::Result<()> {
        for (path, found) in std::mem::take(&mut self.above) {
            self.entry(&path, &found)?;
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, found: &Metadata) -> io::Result<()> {
        let kind = found.file_type();
        let mut header = Header::new_gnu();
        header.set_mode(found.mode() & 0o7777);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(u64::try_from(found.mtime()).unwrap_or(0));
        header.set_size(0);
        // What is hashed can be told apart: each part with its length before it.
        let mut hash = |part: &[u8]| {
            self.hasher.update((part.len() as u64).to_le_bytes());
            self.hasher.update(part);
        };
        hash(path.as_os_str().as_bytes());
        hash(&found.mode().to_le_bytes());
        watch(self.cx, self.sent.bytes, None, "sending the directory that the image is built from")?;
        if kind.is_symlink() {
            let target = fs::read_link(self.root.join(path))?;
            hash(target.as_os_str().as_bytes());
            header.set_entry_type(EntryType::Symlink);
            return self.archive.append_link(&mut header, path, target);
        }
        if kind.is_file() {
            let file = File::open(self.root.join(path))?;
            header.set_entry_type(EntryType::Regular);
            header.set_size(found.len());
            self.hasher.update(found.len().to_le_bytes());
            self.sent.files += 1;
            self.sent.bytes += found.len();
            let content = Exactly { file, left: found.len(), hasher: &mut self.hasher, cx: self.cx };
            return self.archive.append_data(&mut header, path, content);
        }
        header.set_entry_type(match kind {
            kind if kind.is_dir() => EntryType::Directory,
            kind if kind.is_fifo() => EntryType::Fifo,
            kind if kind.is_block_device() => EntryType::Block,
            _ => EntryType::Char,
        });
        if kind.is_block_device() || kind.is_char_device() {
            header.set_device_major(rustix::fs::major(found.rdev()))?;
            header.set_device_minor(rustix::fs::minor(found.rdev()))?;
        }
        self.archive.append_data(&mut header, path, io::empty())
    }
}

/// Reads a file to the length that its header says, and not further.
struct Exactly<'a> {
    file: File,
    left: u64,
    hasher: &'a mut Sha256,
    cx: &'a Context,
}

impl Read for Exactly<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if most == 0 {
            return Ok(0);
        }
        if self.cx.cancelled().is_cancelled() {
            return Err(io::Error::other("cancelled"));
        }
        let read = self.file.read(&mut buffer[..most])?;
        if read == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it got shorter"));
        }
        self.hasher.update(&buffer[..read]);
        self.left -= read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;
    use crate::volumes::members::Members;
    use upgrade_core::testkit::TestContext;

    fn sent(root: &Path) -> (Vec<String>, Sent) {
        let mut bytes = Vec::new();
        let directory = Directory { root: root.to_owned(), dockerfile: "Dockerfile".into() };
        let sent = directory.send(&mut bytes, &TestContext::new("build").forward()).unwrap();
        let mut members = Members::new(&bytes[..]);
        let mut names = Vec::new();
        while let Some(member) = members.next().unwrap() {
            assert_eq!(member.owner, (0, 0));
            let link = String::from_utf8_lossy(&member.link);
            names.push(format!("{} {:o} {link}", String::from_utf8_lossy(&member.name), member.mode));
        }
        (names, sent)
    }

    #[test]
    fn what_is_sent_is_the_directory_without_what_is_ignored() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        for (name, mode) in [("Dockerfile", 0o644), ("out/kept/a", 0o600), ("out/b", 0o644), ("run.sh", 0o755)] {
            fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
            fs::write(root.join(name), name).unwrap();
            fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        for directory in ["out", "out/kept"] {
            fs::set_permissions(root.join(directory), fs::Permissions::from_mode(0o755)).unwrap();
        }
        symlink("run.sh", root.join("link")).unwrap();
        fs::write(root.join(IGNORE), "out\n!out/kept\nDockerfile\n").unwrap();
        fs::set_permissions(root.join(IGNORE), fs::Permissions::from_mode(0o644)).unwrap();
        let (names, first) = sent(root);
        let expected = [
            ".dockerignore 644 ",
            "Dockerfile 644 ",
            "link 777 run.sh",
            "out 755 ",
            "out/kept 755 ",
            "out/kept/a 600 ",
            "run.sh 755 ",
        ];
        assert_eq!(names, expected);
        assert_eq!((first.files, first.bytes), (4, 10 + 10 + 6 + 25));
        // What is not sent changes nothing, and neither does a time; content, mode and link do.
        fs::write(root.join("out/b"), "another").unwrap();
        fs::File::options()
            .append(true)
            .open(root.join("run.sh"))
            .unwrap()
            .set_modified(std::time::UNIX_EPOCH)
            .unwrap();
        assert_eq!(sent(root).1, first);
        fs::set_permissions(root.join("run.sh"), fs::Permissions::from_mode(0o700)).unwrap();
        let second = sent(root).1;
        fs::write(root.join("run.sh"), "RUN.sh").unwrap();
        let third = sent(root).1;
        assert!(first.sha256 != second.sha256 && second.sha256 != third.sha256);
    }
}
