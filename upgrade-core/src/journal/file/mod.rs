//! A journal in a directory: one file a run, JSON Lines, one write and one sync an append.
//!
//! ```text
//! runs/<run>.jsonl        the records of a run, see `scan` for the layout
//! locks/<name>.lock       the leases
//! requests/<run>/         requests to the driver of a run
//! sealed/<run>/<digest>   contents found, kept for an undo
//! ```
//!
//! Directories are made 0700 and files 0600. Readers take no lock: they may see an append that is
//! being written and leave it out. Only the driver of a run cuts its file.

mod lease;
mod medium;
mod read;
mod requests;
mod run;
mod scan;
mod sealed;
mod slots;
mod summary;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::runtime::RuntimeFlavor;

use self::lease::Locks;
use self::requests::make_directory;
use self::run::RunFile;
use self::sealed::{FileSealed, Seal};
use super::chain::chain;
use super::patience::acquire_within;
use super::{Fault, Hold, Journal, JournalError, Lease, RunSummary};
use crate::entry::{Entry, Header, Record, Request};
use crate::names::{LockName, RunId, Seq};
use crate::sealed::SealedStorage;

/// Keeps a journal in a directory of the local file system.
///
/// # Guarantees
/// Those of [`Journal`]. Besides: a damaged, edited, deleted, inserted or reordered line is found
/// by every [`Journal::load`], and so is a tail cut off below the head, which is exact but for the
/// append being written, and after a loss of power as old as what the system had not yet written
/// back of it. A lease on a path excludes leases
/// on everything below it and above it. A driver that dies frees its leases at once.
///
/// # Assumptions
/// The directory is on a local file system, whose locks all drivers see: not on NFS, not shared
/// between machines. On a runtime of several threads, `append` is not called from within a
/// `LocalSet`, where a worker cannot make room for others.
///
/// # Caveats
/// An append that was cut off by a crash is there entirely or not at all; which of the two is
/// settled, and made durable, by the first append of the next driver. A reader that is not the
/// driver may see entries that are not durable yet: act on what was loaded only after an append.
/// The chain is not keyed: it shows damage and careless edits, not those of somebody who computes
/// all digests again.
///
/// # Errors
/// Files that cannot be read or written are [`JournalError::Storage`]; after a failed write or
/// sync the lease answers [`JournalError::Poisoned`].
#[derive(Clone)]
pub struct FileJournal {
    directory: PathBuf,
    seal: Seal,
}

impl std::fmt::Debug for FileJournal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileJournal").field("directory", &self.directory).finish_non_exhaustive()
    }
}

impl FileJournal {
    /// Opens the journal in a directory, which is made if it is not there.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self, JournalError> {
        // Absolute, so that a driver that changes its working directory keeps its journal.
        let directory = std::path::absolute(directory.as_ref()).map_err(storage("open", directory.as_ref()))?;
        for part in ["runs", "locks", "requests", "sealed"] {
            make_directory(&directory.join(part))?;
        }
        Ok(Self { directory, seal: Seal::Plain })
    }

    /// Encrypts found contents with a key of 32 bytes in hexadecimal from now on.
    ///
    /// Contents that were kept without a key stay readable.
    ///
    /// # Errors
    /// The key is not 64 hexadecimal digits.
    #[cfg(feature = "encryption")]
    pub fn with_key(mut self, key: &str) -> Result<Self, JournalError> {
        let cipher = super::cipher::Cipher::from_hex(key).map_err(storage("use the key of", &self.directory))?;
        self.seal = Seal::Key(Arc::new(cipher));
        Ok(self)
    }

    fn run_path(&self, run: &RunId) -> PathBuf {
        self.directory.join("runs").join(format!("{run}.jsonl"))
    }

    fn requests_path(&self, run: &RunId) -> PathBuf {
        self.directory.join("requests").join(run.as_str())
    }
}

#[async_trait]
impl Journal for FileJournal {
    async fn acquire(&self, locks: &[LockName], patience: Duration) -> Result<Lease, JournalError> {
        acquire_within(locks, patience, |names| async move {
            let (directory, wanted) = (self.directory.clone(), names.clone());
            let locks = off_thread(move || Locks::try_take(&directory.join("locks"), &wanted)).await??;
            let epoch = locks.epoch();
            let driver = Driver {
                directory: self.directory.clone(),
                runs: Mutex::default(),
                failed: AtomicBool::new(false),
                usual: AtomicU64::new(u64::MAX),
                locks,
            };
            Ok(Lease::new(names, epoch, Box::new(FileHold(Arc::new(driver)))))
        })
        .await
    }

    async fn append(
        &self,
        lease: &Lease,
        run: &RunId,
        at: Seq,
        entries: &[Entry],
    ) -> Result<Vec<Record>, JournalError> {
        let driver = lease
            .hold()
            .as_any()
            .downcast_ref::<FileHold>()
            .filter(|hold| hold.0.directory == self.directory)
            .map(|hold| hold.0.clone())
            .ok_or_else(|| JournalError::LeaseLost { reason: "it is a lease of another journal".into() })?;
        let (run, path, entries) = (run.clone(), self.run_path(run), entries.to_vec());
        let usual = driver.usual.load(Ordering::Relaxed);
        let append = move || {
            let began = Instant::now();
            let appended = driver.append(&path, &run, at, entries);
            driver.took(began.elapsed());
            appended
        };
        // On a fast disk the append is no longer than a task may hold its thread, and handing it,
        // or what else that thread had to do, to another one costs several times as much.
        match tokio::runtime::Handle::current().runtime_flavor() {
            _ if usual < SHORT => append(),
            RuntimeFlavor::MultiThread => tokio::task::block_in_place(append),
            _ => off_thread(append).await?,
        }
    }

    async fn load(&self, run: &RunId) -> Result<Vec<Record>, JournalError> {
        let (path, run) = (self.run_path(run), run.clone());
        off_thread(move || read::load(&path, &run)).await?
    }

    async fn header(&self, run: &RunId) -> Result<Header, JournalError> {
        let (path, run) = (self.run_path(run), run.clone());
        off_thread(move || summary::header(&path, &run)).await?
    }

    async fn runs(&self) -> Result<Vec<RunSummary>, JournalError> {
        let directory = self.directory.join("runs");
        off_thread(move || {
            let mut runs = Vec::new();
            for entry in std::fs::read_dir(&directory).map_err(storage("read", &directory))? {
                let path = entry.map_err(storage("read", &directory))?.path();
                let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".jsonl"));
                if let Some(run) = name.and_then(|name| RunId::try_from(name).ok()) {
                    runs.push(summary::summarize(&path, &run));
                }
            }
            runs.sort_by(|a, b| (a.created, &a.run).cmp(&(b.created, &b.run)));
            Ok(runs)
        })
        .await?
    }

    async fn post(&self, run: &RunId, request: &Request) -> Result<(), JournalError> {
        let (path, directory, run, request) =
            (self.run_path(run), self.requests_path(run), run.clone(), request.clone());
        off_thread(move || {
            if !path.exists() {
                return Err(JournalError::NoRun(run));
            }
            requests::post(&directory, &request)
        })
        .await?
    }

    async fn requests(&self, run: &RunId) -> Result<Vec<Request>, JournalError> {
        let directory = self.requests_path(run);
        off_thread(move || requests::list(&directory)).await?
    }

    async fn withdraw(&self, run: &RunId, id: &str) -> Result<(), JournalError> {
        let (directory, id) = (self.requests_path(run), id.to_owned());
        off_thread(move || requests::withdraw(&directory, &id)).await?
    }

    async fn sealed(&self, run: &RunId) -> Result<Arc<dyn SealedStorage>, JournalError> {
        let directory = self.directory.join("sealed").join(run.as_str());
        Ok(Arc::new(FileSealed { directory, seal: self.seal.clone() }))
    }

    async fn verify(&self, run: &RunId) -> Result<Vec<Fault>, JournalError> {
        let (path, run) = (self.run_path(run), run.clone());
        off_thread(move || read::verify(&path, &run)).await?
    }

    fn home(&self) -> Vec<LockName> {
        LockName::path(&self.directory).into_iter().collect()
    }
}

/// How long an append may usually take to be made where it is asked for, in nanoseconds: what a
/// task may do between two awaits without holding others up.
const SHORT: u64 = 100_000;

/// Holds all that a driver has open; dropped, its files are at rest and its locks free.
struct Driver {
    directory: PathBuf,
    runs: Mutex<BTreeMap<RunId, RunFile>>,
    failed: AtomicBool,
    /// How long an append has usually taken of late, in nanoseconds.
    usual: AtomicU64,
    // Last: whoever gets the locks next finds the files of the runs closed.
    locks: Locks,
}

struct FileHold(Arc<Driver>);

impl Driver {
    /// Takes the duration of an append into what is usual.
    fn took(&self, elapsed: Duration) {
        let elapsed = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        let usual = match self.usual.load(Ordering::Relaxed) {
            u64::MAX => elapsed,
            usual => usual - usual / 4 + elapsed / 4,
        };
        self.usual.store(usual, Ordering::Relaxed);
    }

    fn append(&self, path: &Path, run: &RunId, at: Seq, entries: Vec<Entry>) -> Result<Vec<Record>, JournalError> {
        // Appends of one lease wait for each other here; a panic in one leaves `failed` set.
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        self.check(&mut runs)?;
        if !runs.contains_key(run) && (at > 0 || path.exists()) {
            match RunFile::open(path, run) {
                Ok(file) => drop(runs.insert(run.clone(), file)),
                Err(JournalError::NoRun(_)) => {}
                Err(error) => return Err(self.fail(error)),
            }
        }
        let (actual, prev) = runs.get(run).map_or((0, ""), |file| (file.entries(), file.digest()));
        if actual != at {
            return Err(JournalError::Sequence { run: run.clone(), expected: at, actual });
        }
        if entries.is_empty() {
            return Ok(Vec::new());
        }
        let chained = chain(at, prev, Timestamp::now(), entries)
            .map_err(io::Error::from)
            .map_err(storage("write an entry to", path))?;
        self.failed.store(true, Ordering::SeqCst);
        match runs.get_mut(run) {
            Some(file) => file.append(&chained)?,
            None => drop(runs.insert(run.clone(), RunFile::create(path, run, &chained)?)),
        }
        self.failed.store(false, Ordering::SeqCst);
        Ok(chained.records)
    }

    /// Checks that the lease may still be written under; one that is lost lets its files go.
    fn check(&self, runs: &mut BTreeMap<RunId, RunFile>) -> Result<(), JournalError> {
        if self.failed.load(Ordering::SeqCst) {
            return Err(JournalError::Poisoned);
        }
        self.locks.verify().inspect_err(|_| runs.clear())
    }

    /// Remembers an error that leaves open what the disk holds.
    fn fail(&self, error: JournalError) -> JournalError {
        if matches!(&error, JournalError::Storage { action, .. } if matches!(*action, "write" | "sync" | "cut")) {
            self.failed.store(true, Ordering::SeqCst);
        }
        error
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let runs = self.runs.get_mut().unwrap_or_else(PoisonError::into_inner);
        if *self.failed.get_mut() || self.locks.verify().is_err() {
            return;
        }
        for file in runs.values_mut() {
            // Nobody hears of a failure here, and nothing is lost by it: the next driver settles
            // what this one leaves.
            let _ = file.rest();
        }
        runs.clear();
    }
}

#[async_trait]
impl Hold for FileHold {
    async fn verify(&self) -> Result<(), JournalError> {
        let driver = self.0.clone();
        off_thread(move || {
            let mut runs = driver.runs.lock().unwrap_or_else(PoisonError::into_inner);
            driver.check(&mut runs)
        })
        .await?
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// Reads bytes as the file of a run, as [`Journal::load`] does; for fuzzing.
///
/// # Errors
/// As [`Journal::load`].
#[cfg(feature = "testkit")]
pub fn read_bytes(mut bytes: &[u8]) -> Result<Vec<Record>, JournalError> {
    read::read_records(&mut bytes, "bytes", None)
}

/// Runs what blocks where it does not hold up the runtime. It runs to its end even if the caller
/// is dropped, so that a cancelled append is written or not, and never half.
async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, JournalError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| JournalError::Storage {
        action: "work on",
        path: PathBuf::from("the journal"),
        source: io::Error::other(error),
    })
}

/// Makes the error of a file operation that failed.
fn storage(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JournalError {
    let path = path.to_path_buf();
    move |source| JournalError::Storage { action, path, source }
}

fn sync_directory(path: &Path) -> Result<(), JournalError> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(storage("sync", path))
}
