//! The file of one run in the hands of the driver that writes it.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufReader, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use super::medium::Medium;
use super::scan::{FORMAT, Head, damaged, scan};
use super::slots::{SLOTS, Slots};
use super::{storage, sync_directory};
use crate::entry::{Entry, Record};
use crate::journal::JournalError;
use crate::journal::chain::Chained;
use crate::names::{LockName, RunId, Seq};
use crate::transition::RunState;

/// The first chunk suits a run of a few dozen entries; each further one is twice as long.
const FIRST_CHUNK: u64 = 64 * 1024;
const LARGEST_CHUNK: u64 = 1024 * 1024;

/// Appends to the file of one run, which it holds locked against any other driver.
#[derive(Debug)]
pub(super) struct RunFile {
    file: File,
    path: PathBuf,
    slots: Slots<Head>,
    entries: Seq,
    digest: String,
    medium: Medium,
    /// Where the file ends, with the space allocated ahead.
    allocated: u64,
    /// How much is allocated next; zero for nothing.
    chunk: u64,
    state: Option<RunState>,
    updated: Option<Timestamp>,
    /// Whether the run is bound to another definition than its first entry says.
    adopted: bool,
    at_rest: bool,
}

impl RunFile {
    /// Makes the file of a run, durable with its first records or not there at all.
    pub(super) fn create(path: &Path, run: &RunId, chained: &Chained) -> Result<Self, JournalError> {
        // Under its own name, a file that was cut off by a crash would be a damaged run.
        let new = path.with_extension("new");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .map_err(storage("create", &new))?;
        lock(&file, run, &new)?;
        let length = SLOTS as u64 + chained.lines.len() as u64;
        let entries = chained.records.len() as Seq;
        let digest = chained.records.last().map(|record| record.digest.clone()).unwrap_or_default();
        let head = Head { format: FORMAT, entries, length, digest: digest.clone(), state: None, updated: None };
        let (slots, mut bytes) = Slots::start(head).map_err(storage("write", path))?;
        bytes.extend_from_slice(&chained.lines);
        file.write_all_at(&bytes, 0).map_err(storage("write", &new))?;
        file.sync_all().map_err(storage("sync", &new))?;
        std::fs::rename(&new, path).map_err(storage("rename", &new))?;
        sync_directory(path.parent().unwrap_or(path))?;
        let mut made = Self {
            medium: Medium::new(&file, path, length).map_err(storage("read", path))?,
            file,
            path: path.to_path_buf(),
            slots,
            entries,
            digest,
            allocated: length,
            chunk: FIRST_CHUNK,
            state: None,
            updated: None,
            adopted: false,
            at_rest: false,
        };
        made.note(&chained.records);
        if made.is_final() {
            made.rest()?;
        }
        Ok(made)
    }

    /// Opens the file of a run for appending: cuts a torn tail, makes durable what may not be.
    pub(super) fn open(path: &Path, run: &RunId) -> Result<Self, JournalError> {
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => JournalError::NoRun(run.clone()),
            _ => storage("open", path)(error),
        })?;
        lock(&file, run, path)?;
        let place = path.display().to_string();
        let found = scan(
            &mut BufReader::with_capacity(64 * 1024, &file),
            &place,
            |line| Ok((line.at()?, state_of(line.entry)?, is_adoption(line.entry))),
            |line, reason| Err(damaged(&place, line, reason)),
        )?;
        let entries = found.items.len() as Seq;
        let mut opened = Self {
            path: path.to_path_buf(),
            entries,
            digest: found.digest,
            medium: Medium::new(&file, path, found.end).map_err(storage("read", path))?,
            allocated: found.end,
            chunk: FIRST_CHUNK,
            state: found.items.iter().rev().find_map(|(_, state, _)| *state),
            updated: found.items.last().map(|(at, _, _)| *at),
            adopted: found.items.iter().any(|(_, _, adopted)| *adopted),
            at_rest: false,
            slots: found.slots,
            file,
        };
        let durable = opened.slots.value.length;
        let length = opened.file.metadata().map_err(storage("read", path))?.len();
        let end = found.end;
        opened.at_rest = length == end && durable == end && opened.slots.broken.is_none();
        if !opened.at_rest {
            // After a sync that failed, these bytes may stand in memory alone, marked as written:
            // only writing them again makes the next sync carry them to the disk.
            let mut beyond = vec![0; end.saturating_sub(durable) as usize];
            opened.file.read_exact_at(&mut beyond, durable).map_err(storage("read", path))?;
            opened.file.write_all_at(&beyond, durable).map_err(storage("write", path))?;
            opened.rest()?;
        }
        Ok(opened)
    }

    /// Counts the entries of the run.
    pub(super) fn entries(&self) -> Seq {
        self.entries
    }

    /// Returns the digest of the last entry.
    pub(super) fn digest(&self) -> &str {
        &self.digest
    }

    /// Writes records and returns when they are durable. After an error nothing more may be
    /// written: what stands in the file is not known.
    pub(super) fn append(&mut self, chained: &Chained) -> Result<(), JournalError> {
        self.at_rest = false;
        self.reserve(self.medium.end() + chained.lines.len() as u64)?;
        self.medium.append(&self.file, &chained.lines).map_err(storage("write", &self.path))?;
        self.entries += chained.records.len() as Seq;
        if let Some(last) = chained.records.last() {
            self.digest.clone_from(&last.digest);
        }
        // Not synced: what it says is durable already, and it goes to the disk in its own time.
        let head = self.head();
        self.slots.write(&self.file, head).map_err(storage("write", &self.path))?;
        let was_final = self.is_final();
        self.note(&chained.records);
        // A run that is over is listed for years: let its head tell, so that nobody reads the rest.
        if self.is_final() && !was_final { self.rest() } else { Ok(()) }
    }

    /// Makes the head durable and cuts what was allocated ahead.
    pub(super) fn rest(&mut self) -> Result<(), JournalError> {
        if self.at_rest {
            return Ok(());
        }
        let head = Head {
            // Without a state, a list reads the whole run and finds the definition adopted last.
            state: (!self.adopted).then(|| self.state.unwrap_or(RunState::Checking)),
            updated: self.updated,
            ..self.head()
        };
        self.slots.write(&self.file, head).map_err(storage("write", &self.path))?;
        self.file.set_len(self.medium.end()).map_err(storage("cut", &self.path))?;
        self.file.sync_all().map_err(storage("sync", &self.path))?;
        self.allocated = self.medium.end();
        self.at_rest = true;
        if self.is_final() {
            self.chunk = 0;
        }
        Ok(())
    }

    fn head(&self) -> Head {
        Head {
            format: FORMAT,
            entries: self.entries,
            length: self.medium.end(),
            digest: self.digest.clone(),
            state: None,
            updated: None,
        }
    }

    /// Allocates space ahead of `end`, so that appends find the file's length and blocks as they
    /// are and write data alone.
    ///
    /// Zeros are written out: blocks that are only reserved change their state at the first
    /// write, and the sync pays for it.
    fn reserve(&mut self, end: u64) -> Result<(), JournalError> {
        if self.chunk == 0 || end <= self.allocated {
            self.allocated = self.allocated.max(end);
            return Ok(());
        }
        let target = (end + self.chunk).next_multiple_of(4096);
        let zeros = vec![0; (target - self.allocated) as usize];
        match self.file.write_all_at(&zeros, self.allocated) {
            Ok(()) => {
                self.file.sync_data().map_err(storage("sync", &self.path))?;
                self.allocated = target;
                self.chunk = (self.chunk * 2).min(LARGEST_CHUNK);
            }
            Err(_) => {
                // The disk is nearly full: what room there is belongs to the record. If that
                // cannot be written either, the append says so.
                self.chunk = 0;
                self.file.set_len(self.medium.end()).map_err(storage("cut", &self.path))?;
                self.allocated = end;
            }
        }
        Ok(())
    }

    fn note(&mut self, records: &[Record]) {
        for record in records {
            self.updated = Some(record.at);
            match &record.entry {
                Entry::RunEntered { state, .. } => self.state = Some(*state),
                Entry::DefinitionAdopted { .. } => self.adopted = true,
                _ => {}
            }
        }
    }

    fn is_final(&self) -> bool {
        self.state.is_some_and(RunState::is_final)
    }
}

/// Reads the state that an entry brings the run to, without reading entries that bring it to none.
pub(super) fn state_of(entry: &str) -> Result<Option<RunState>, String> {
    if !entry.starts_with("{\"type\":\"run_entered\"") {
        return Ok(None);
    }
    match serde_json::from_str(entry) {
        Ok(Entry::RunEntered { state, .. }) => Ok(Some(state)),
        Ok(_) => Ok(None),
        Err(error) => Err(format!("its entry cannot be read: {error}")),
    }
}

/// Tells whether an entry binds the run to another definition.
pub(super) fn is_adoption(entry: &str) -> bool {
    entry.starts_with("{\"type\":\"definition_adopted\"")
}

/// Locks the file itself: leases on other names must not let two drivers write one run.
fn lock(file: &File, run: &RunId, path: &Path) -> Result<(), JournalError> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(JournalError::Held {
            lock: LockName::new("run", run.as_str()).map_err(|error| storage("lock", path)(io::Error::other(error)))?,
            holder: "the driver that writes this run".into(),
        }),
        Err(TryLockError::Error(error)) => Err(storage("lock", path)(error)),
    }
}

/// Writes a small file durably: another process sees all of it or nothing.
pub(super) fn write_durably(path: &Path, contents: &[u8]) -> Result<(), JournalError> {
    let directory = path.parent().unwrap_or(path);
    let new = directory.join(format!(".{}.new", uuid::Uuid::now_v7()));
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        file.write_all(contents)?;
        file.sync_all()?;
        std::fs::rename(&new, path)
    })();
    if let Err(error) = written {
        let _ = std::fs::remove_file(&new);
        return Err(storage("write", path)(error));
    }
    sync_directory(directory)
}
