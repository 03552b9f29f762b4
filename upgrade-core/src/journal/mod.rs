//! The durable record of a run, and the lease under which it is written.
//!
//! A journal is what makes the promise of a transaction survive a crash: whatever is not in it
//! was not done, and whatever is in it is durable. Two come with this crate: [`FileJournal`] in a
//! directory, and [`MemoryJournal`] for tests and for runs that need not survive their process;
//! `upgrade-postgres` keeps one in a PostgreSQL database.
//! A journal of one's own passes the suite in `conformance` (feature `testkit`).
//!
//! Each record carries its own digest and that of the record before, see [`chain`]: the journal
//! is also the audit log.

pub mod chain;
#[cfg(feature = "encryption")]
pub mod cipher;
#[cfg(feature = "testkit")]
pub mod conformance;
pub mod file;
pub mod memory;
mod patience;

pub use self::file::FileJournal;
pub use self::memory::MemoryJournal;
pub use self::patience::acquire_within;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use semver::Version;
use serde::{Deserialize, Serialize};

use crate::entry::{Definition, Entry, Header, Record, Request};
use crate::names::{LockName, PipelineName, RunId, Seq};
use crate::sealed::SealedStorage;
use crate::transition::RunState;

/// Keeps the records of runs, the leases under which they are driven, and requests to drivers.
///
/// # Guarantees
/// - `append` returns when the entries are durable, all of them or none, in one chain.
/// - At most one lease on a lock name is held at a time, by any process that uses the journal.
/// - A lease that was lost, or is older than another on the same names, cannot append.
/// - `load` returns what was appended, or says which line is damaged; never less in silence.
///
/// # Assumptions
/// The storage does what it says: a sync that returned is on the medium.
///
/// # Caveats
/// An append that failed leaves it open whether its entries are durable. The journal refuses
/// every further append on that lease; whoever acquires a new one and loads the run sees what
/// became of them.
///
/// # Errors
/// See [`JournalError`]. No operation is retried inside.
#[async_trait]
pub trait Journal: Send + Sync + 'static {
    /// Takes the right to drive what the names stand for, all of them or none.
    ///
    /// Takes the names in sorted order. Waits up to `patience` for another holder, polling at
    /// least every 100 ms; [`Duration::ZERO`] answers at once.
    async fn acquire(&self, locks: &[LockName], patience: Duration) -> Result<Lease, JournalError>;

    /// Appends entries to a run, the first of them with number `at`; the first entry makes the run.
    ///
    /// Returns the records as they are kept.
    async fn append(&self, lease: &Lease, run: &RunId, at: Seq, entries: &[Entry])
    -> Result<Vec<Record>, JournalError>;

    /// Returns all records of a run, the chain verified.
    async fn load(&self, run: &RunId) -> Result<Vec<Record>, JournalError>;

    /// Returns the description that a run begins with; reads no more than it must.
    async fn header(&self, run: &RunId) -> Result<Header, JournalError> {
        match self.load(run).await?.into_iter().next().map(|record| record.entry) {
            Some(Entry::RunCreated(header)) => Ok(*header),
            _ => Err(JournalError::Damaged {
                place: format!("run {run}"),
                line: 1,
                reason: "the first entry is not that of a run's creation".into(),
            }),
        }
    }

    /// Lists the runs, oldest first. A damaged run is listed with what is wrong with it.
    async fn runs(&self) -> Result<Vec<RunSummary>, JournalError>;

    /// Leaves a request for the driver of a run, durably.
    async fn post(&self, run: &RunId, request: &Request) -> Result<(), JournalError>;

    /// Returns the requests to a run that were not withdrawn, oldest first.
    async fn requests(&self, run: &RunId) -> Result<Vec<Request>, JournalError>;

    /// Removes a request that is answered; one that is gone already is not an error.
    async fn withdraw(&self, run: &RunId, id: &str) -> Result<(), JournalError>;

    /// Opens the storage for found contents of a run, kept beside the journal.
    async fn sealed(&self, run: &RunId) -> Result<Arc<dyn SealedStorage>, JournalError>;

    /// Lists every record of a run that is not as it was written; empty for one that is whole.
    async fn verify(&self, run: &RunId) -> Result<Vec<Fault>, JournalError> {
        match self.load(run).await {
            Ok(_) => Ok(Vec::new()),
            Err(JournalError::Damaged { line, reason, .. }) => Ok(vec![Fault { line, reason, harmless: false }]),
            Err(error) => Err(error),
        }
    }

    /// Names what the journal lives in, so that a pipeline that changes it can be refused.
    fn home(&self) -> Vec<LockName>;
}

/// Describes a record of a journal that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The line, from one.
    pub line: u64,
    /// What is wrong with it.
    pub reason: String,
    /// Whether the journal mends it by itself: a torn write, one of the two slots of the head.
    pub harmless: bool,
}

/// Holds the exclusive right to drive what some lock names stand for; dropped, it is released.
pub struct Lease {
    locks: Vec<LockName>,
    epoch: u64,
    hold: Box<dyn Hold>,
}

/// Keeps a lease alive for one kind of journal.
#[async_trait]
pub trait Hold: Send + Sync + 'static {
    /// Tells whether the lease is still held, renewing it where that is needed.
    async fn verify(&self) -> Result<(), JournalError>;

    /// Gives the journal that made the hold its own type back.
    fn as_any(&self) -> &dyn std::any::Any;
}

impl Lease {
    /// Makes a lease; for journals.
    pub fn new(locks: Vec<LockName>, epoch: u64, hold: Box<dyn Hold>) -> Self {
        Self { locks, epoch, hold }
    }

    /// Returns the names held, sorted.
    pub fn locks(&self) -> &[LockName] {
        &self.locks
    }

    /// Returns the epoch: higher than that of every earlier lease on any of the names.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Tells whether the lease is still held.
    ///
    /// # Errors
    /// [`JournalError::LeaseLost`], or the storage failed; either way, nothing more may be done.
    pub async fn verify(&self) -> Result<(), JournalError> {
        self.hold.verify().await
    }

    /// Returns what keeps the lease alive; for journals.
    pub fn hold(&self) -> &dyn Hold {
        &*self.hold
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease").field("locks", &self.locks).field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

/// Describes a run in a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunSummary {
    /// The run.
    pub run: RunId,
    /// What is upgraded.
    pub pipeline: Option<PipelineName>,
    /// The environment, if the pipeline names one.
    pub environment: Option<String>,
    /// The version found before the run, if it is known.
    pub from: Option<Version>,
    /// The version that the run leads to, if its pipeline names one.
    pub to: Option<Version>,
    /// The names under which the run holds its targets.
    pub locks: Vec<LockName>,
    /// The fingerprint of its definition.
    pub fingerprint: String,
    /// The fingerprint without its environment's overlay.
    pub base_fingerprint: String,
    /// The state it is in.
    pub state: Option<RunState>,
    /// When it was created.
    pub created: Option<Timestamp>,
    /// When its last entry was written.
    pub updated: Option<Timestamp>,
    /// How many entries it has.
    pub entries: Seq,
    /// What is wrong with its journal, if anything.
    pub damage: Option<String>,
}

impl RunSummary {
    /// Describes a run by its records.
    pub fn of(run: &RunId, records: &[Record]) -> Self {
        let mut summary = Self::unread(run);
        summary.follow(records);
        if summary.state.is_none() {
            summary.damage = Some("the first entry is not that of a run's creation".into());
        }
        summary
    }

    /// Describes a run of which nothing is read yet.
    pub fn unread(run: &RunId) -> Self {
        Self {
            run: run.clone(),
            pipeline: None,
            environment: None,
            from: None,
            to: None,
            locks: Vec::new(),
            fingerprint: String::new(),
            base_fingerprint: String::new(),
            state: None,
            created: None,
            updated: None,
            entries: 0,
            damage: None,
        }
    }

    /// Takes further records into the description.
    pub fn follow(&mut self, records: &[Record]) {
        for record in records {
            match &record.entry {
                Entry::RunCreated(header) if self.entries == 0 => {
                    self.pipeline = Some(header.pipeline.clone());
                    self.environment.clone_from(&header.environment);
                    self.from.clone_from(&header.from);
                    self.to.clone_from(&header.to);
                    self.locks.clone_from(&header.locks);
                    self.bind(&header.definition);
                    self.state = Some(RunState::Checking);
                }
                Entry::RunEntered { state, .. } if self.state.is_some() => self.state = Some(*state),
                Entry::DefinitionAdopted { definition, .. } if self.state.is_some() => self.bind(definition),
                _ => {}
            }
            self.created = self.created.or(Some(record.at));
            self.updated = Some(record.at);
            self.entries += 1;
        }
    }

    fn bind(&mut self, definition: &Definition) {
        self.fingerprint.clone_from(&definition.fingerprint);
        self.base_fingerprint.clone_from(&definition.base_fingerprint);
    }
}

/// Says why a journal did not do what it was asked. The run halts and can be resumed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// Somebody else holds one of the names.
    #[error("{lock} is held by {holder}")]
    Held {
        /// The name.
        lock: LockName,
        /// Who holds it, as far as is known.
        holder: String,
    },
    /// The lease is not held any more.
    #[error("the lease was lost: {reason}")]
    LeaseLost {
        /// How.
        reason: String,
    },
    /// The run has other entries than the caller believes.
    #[error("run {run} has {actual} entries where {expected} were expected: another driver wrote")]
    Sequence {
        /// The run.
        run: RunId,
        /// How many the caller believes there are.
        expected: Seq,
        /// How many there are.
        actual: Seq,
    },
    /// There is no such run.
    #[error("there is no run {0}")]
    NoRun(RunId),
    /// A record is damaged.
    #[error("{place}, line {line}: {reason}")]
    Damaged {
        /// The file or table.
        place: String,
        /// The line or row, from one.
        line: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// The journal was written in a format that this program does not know.
    #[error("{place} has format {found}; this program reads up to format {known}")]
    Format {
        /// The file or table.
        place: String,
        /// Its format.
        found: u32,
        /// The newest format known.
        known: u32,
    },
    /// The storage failed.
    #[error("cannot {action} {path}")]
    Storage {
        /// What was tried: "write", "sync".
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// An earlier append failed: nothing more is written on this lease.
    #[error("an earlier write to the journal failed; nothing more is written")]
    Poisoned,
    /// The journal cannot be kept there as it is.
    #[error("the journal cannot be kept there: {reason}")]
    Unusable {
        /// What stands in the way.
        reason: String,
        /// The line that tells what to do.
        hint: String,
    },
    /// The server of the journal failed.
    #[error("the journal's server failed: {message}")]
    Server {
        /// What was tried.
        message: String,
        /// What the server or the connection said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl JournalError {
    /// Returns the line that tells what to do.
    pub fn hint(&self) -> String {
        match self {
            Self::Held { .. } => "wait for it with --wait, look at it with `upgrade status`, or stop it with `upgrade stop`".into(),
            Self::LeaseLost { .. } | Self::Sequence { .. } => {
                "another driver has the run: follow it with `upgrade status --watch`".into()
            }
            Self::NoRun(_) => "`upgrade history` lists the runs".into(),
            Self::Damaged { .. } => {
                "the journal was changed or the disk lost data: restore the file from a copy; `upgrade audit verify` names every damaged line".into()
            }
            Self::Format { .. } => "use the version of the program that wrote it, or a newer one".into(),
            Self::Storage { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                "make room on the disk of the state directory, then `upgrade resume`; \
                 `upgrade run` if no run was begun"
                    .into()
            }
            Self::Storage { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
                "run as the account that owns the state directory".into()
            }
            Self::Storage { .. } => "look at the disk of the state directory, then `upgrade resume`".into(),
            Self::Poisoned => "mend what made the first write fail, then `upgrade resume`".into(),
            Self::Unusable { hint, .. } => hint.clone(),
            Self::Server { .. } => "bring the server back, then `upgrade resume`".into(),
        }
    }
}
