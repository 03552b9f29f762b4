//! A backup of a volume in one file, a `tar.zst` that proves itself: its last member lists every
//! entry with its digest.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use bollard::models::Volume;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tar::{Builder, Header};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::sealed::hex;
use upgrade_core::units::Bytes;

use super::contents::{Contents, pass, watch};
use super::helper::{TOP, broken, unsent};
use super::members::Members;
use super::storage;
use crate::error::cancelled;

/// The member that lists the others; it is the last one.
const MANIFEST: &str = "manifest.json";
/// The directory that every other member is below, so that none can be taken for the manifest.
const FILES: &str = "files";

/// Lists what a backup holds, and of which volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) format: u32,
    /// The run and the step that made it.
    pub(crate) made_by: String,
    pub(crate) created: String,
    pub(crate) volume: Description,
    pub(crate) contents: Contents,
}

/// Describes a volume as far as it was chosen when it was made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Description {
    pub(crate) name: String,
    pub(crate) driver: String,
    /// May hold a secret, as those of a network file system do: it stands only in the archive.
    #[serde(default)]
    pub(crate) options: std::collections::BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) labels: std::collections::BTreeMap<String, String>,
}

impl Description {
    pub(crate) fn of(volume: &Volume) -> Self {
        let sorted = |map: &std::collections::HashMap<String, String>| map.clone().into_iter().collect();
        Self {
            name: volume.name.clone(),
            driver: volume.driver.clone(),
            options: sorted(&volume.options),
            labels: sorted(&volume.labels),
        }
    }
}

/// Holds a backup that was read to its last byte and is what its manifest says.
#[derive(Debug, Clone)]
pub(crate) struct Proven {
    pub(crate) manifest: Manifest,
    /// SHA-256 of the packed file.
    pub(crate) sha256: String,
}

/// Says how a backup is written.
#[derive(Debug, Clone)]
pub(crate) struct Writing {
    pub(crate) to: PathBuf,
    pub(crate) level: i32,
    /// What must stay free on its file system.
    pub(crate) free: u64,
    pub(crate) volume: Description,
}

impl Writing {
    /// Writes what the engine sends, private and durable.
    ///
    /// # Errors
    /// The engine's archive is not whole; there is no space. The caller removes what was written.
    pub(crate) fn write(&self, stream: &mut dyn Read, cx: &Context) -> Result<(), StepError> {
        let cannot = |error: io::Error| storage::failed(format!("cannot write {}", self.to.display()), &error);
        storage::remove(&self.to).map_err(cannot)?;
        let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&self.to).map_err(cannot)?;
        // Which side an error came from decides what is to be done about it.
        let failed = Rc::new(RefCell::new(None));
        let tracked = Tracked { file, failed: failed.clone(), to: self.to.clone(), free: self.free, since: 0 };
        let mut encoder =
            zstd::Encoder::new(BufWriter::with_capacity(256 << 10, tracked), self.level).map_err(cannot)?;
        encoder.include_checksum(true).map_err(cannot)?;
        let mut archive = Builder::new(encoder);
        let mut report = |done| watch(cx, done, None, "backing up the volume");
        let passed = pass(&mut Members::new(stream), TOP, &mut archive, FILES, None, &mut report);
        let (contents, _) = passed.map_err(|error| match failed.borrow_mut().take() {
            _ if cx.cancelled().is_cancelled() => cancelled(),
            Some(failed) => failed,
            None => broken(&error),
        })?;
        let manifest = Manifest {
            format: 1,
            made_by: cx.marker(),
            created: jiff::Timestamp::now().to_string(),
            volume: self.volume.clone(),
            contents,
        };
        let text = serde_json::to_vec(&manifest).expect("a manifest holds nothing that JSON cannot");
        let mut header = Header::new_gnu();
        header.set_mode(0o600);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(text.len() as u64);
        let written = archive
            .append_data(&mut header, MANIFEST, &*text)
            .and_then(|()| archive.into_inner())
            .and_then(zstd::Encoder::finish)
            .and_then(|buffer| buffer.into_inner().map_err(io::IntoInnerError::into_error))
            .and_then(|tracked| {
                tracked.file.sync_all()?;
                // Read back from the medium, not from what the kernel remembers of it; only advice.
                let _ = rustix::fs::fadvise(&tracked.file, 0, None, rustix::fs::Advice::DontNeed);
                Ok(())
            });
        written.map_err(|error| failed.borrow_mut().take().unwrap_or_else(|| cannot(error)))
    }
}

/// Remembers why a write failed, and keeps from filling the file system.
struct Tracked {
    file: File,
    failed: Rc<RefCell<Option<StepError>>>,
    to: PathBuf,
    free: u64,
    since: u64,
}

impl Tracked {
    fn room(&mut self, length: usize) -> io::Result<()> {
        self.since += length as u64;
        if self.free == 0 || self.since < 16 << 20 {
            return Ok(());
        }
        self.since = 0;
        match storage::free(&self.to)? {
            free if free < self.free => Err(io::Error::from(io::ErrorKind::StorageFull)),
            _ => Ok(()),
        }
    }
}

impl Write for Tracked {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.room(bytes.len()).and_then(|()| self.file.write(bytes)).inspect_err(|error| {
            if error.kind() != io::ErrorKind::Interrupted {
                let what = format!("cannot write {}", self.to.display());
                *self.failed.borrow_mut() = Some(storage::failed(what, error));
            }
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Asks for room before a backup begins; how much it will need, no engine tells.
pub(crate) fn expect_room(to: &Path, wanted: u64) -> Result<(), StepError> {
    let free = storage::free(to).map_err(|error| storage::failed("cannot read the free space", &error))?;
    if free > wanted {
        return Ok(());
    }
    let (below, free) = (storage::parent(to), Bytes(free));
    Err(StepError::permanent(format!("{} has {free} free, and {} must stay so", below.display(), Bytes(wanted)))
        .with_hint("free some space there, or let `to` name another file system"))
}

/// Reads a backup back and compares every entry with its manifest.
///
/// # Errors
/// It is damaged, or is not what its manifest says.
pub(crate) fn prove(archive: &Path, cx: &Context) -> Result<Proven, StepError> {
    read(archive, &mut io::sink(), cx, "reading the backup")
}

/// Reads a backup and writes what it holds as a tar for the engine.
pub(crate) fn replay(archive: &Path, to: &mut dyn Write, cx: &Context) -> Result<Proven, StepError> {
    read(archive, to, cx, "restoring the volume")
}

fn read(archive: &Path, to: &mut dyn Write, cx: &Context, doing: &str) -> Result<Proven, StepError> {
    let unreadable = |error: io::Error| {
        if cx.cancelled().is_cancelled() {
            return cancelled();
        }
        let what = format!("cannot read {} as a backup of a volume", archive.display());
        // What does not come from the system comes from the decoder: it is damaged.
        match error.raw_os_error() {
            None if error.kind() != io::ErrorKind::BrokenPipe => {
                storage::failed(what, &io::Error::new(io::ErrorKind::InvalidData, error))
            }
            _ => unsent(what, &error),
        }
    };
    let file = File::open(archive).map_err(unreadable)?;
    let length = file.metadata().map_err(unreadable)?.len();
    let tally = Rc::new(RefCell::new((Sha256::new(), 0)));
    let hashed = Hashed { file, tally: tally.clone() };
    let decoder = zstd::Decoder::with_buffer(BufReader::with_capacity(256 << 10, hashed)).map_err(unreadable)?;
    let mut report = |_| {
        let done = tally.borrow().1;
        watch(cx, done, Some(length), doing)
    };
    let mut onward = Builder::new(to);
    let passed = pass(&mut Members::new(decoder), FILES, &mut onward, TOP, Some(MANIFEST), &mut report);
    let (contents, manifest) = passed.map_err(unreadable)?;
    let unfit = |reason: &str| {
        StepError::permanent(format!("{} is refused: {reason}", archive.display()))
            .with_hint("use a backup that `docker.volume_backup` made")
    };
    let manifest = manifest.ok_or_else(|| unfit("it has no manifest"))?;
    let manifest: Manifest = serde_json::from_slice(&manifest).map_err(|_| unfit("its manifest cannot be read"))?;
    if manifest.format != 1 {
        return Err(unfit("it is of a format that this program does not know"));
    }
    if let Some(path) = manifest.contents.difference(&contents) {
        return Err(unfit(&format!("{path} is not what its manifest says")));
    }
    onward.into_inner().and_then(|to| to.flush()).map_err(unreadable)?;
    let sha256 = hex(&tally.borrow().0.clone().finalize());
    Ok(Proven { manifest, sha256 })
}

/// Digests the packed bytes as they pass, so that what is read is what is verified.
struct Hashed {
    file: File,
    tally: Rc<RefCell<(Sha256, u64)>>,
}

impl Read for Hashed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        let mut tally = self.tally.borrow_mut();
        tally.0.update(&buffer[..read]);
        tally.1 += read as u64;
        Ok(read)
    }
}
