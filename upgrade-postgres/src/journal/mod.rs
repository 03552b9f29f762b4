//! A journal in a PostgreSQL database: drivers on several machines, one lease, one record.
//!
//! ```text
//! runs       a row a run: how many records it has, the last digest, who writes it
//! records    the records, chained as in a file, the JSON text as it was written
//! leases     a row a lease that is held: its epoch is checked in every append
//! requests   requests to the drivers
//! sealed     contents found, encrypted
//! ```
//!
//! All of them in a schema of their own, made on first use. A lease is a row in `leases` for as
//! long as the session that made it holds the advisory lock of the row's epoch: a driver that dies
//! loses the lock with its connection, and whoever wants the names next removes the row.

mod address;
mod append;
mod clerk;
mod failure;
mod lease;
mod pooler;
mod requests;
mod residence;
mod rows;
mod schema;
mod sealed;
mod summary;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use upgrade_core::entry::{Entry, Header, Record, Request};
use upgrade_core::journal::cipher::Cipher;
use upgrade_core::journal::{Fault, Journal, JournalError, Lease, RunSummary, acquire_within};
use upgrade_core::names::{LockName, RunId, Seq};
use upgrade_core::sealed::SealedStorage;

pub use self::address::JournalAddress;

use self::clerk::Clerk;
use self::lease::PostgresHold;
use self::sealed::PostgresSealed;

/// Keeps a journal in a PostgreSQL database.
///
/// # Guarantees
/// Those of [`Journal`]. An append is one statement in one transaction, which checks the epoch of
/// the lease and holds its row, and returns when the commit is durable; so a lease that was taken
/// away cannot write, whether its driver knows it or not. A driver that dies frees its leases when
/// the server notices: at once if its machine lives, after half a minute if that is gone too.
///
/// # Assumptions
/// The server keeps what it committed: `fsync` is on, and a standby that takes over had all of it.
/// The way to the server is direct, or through a pooler in session mode.
///
/// # Caveats
/// An append that failed, or whose connection broke, may have been committed: the lease writes
/// nothing more, and whoever loads the run sees what became of it.
/// The chain is not keyed: it shows damage and careless edits, not those of somebody who computes
/// all digests again.
///
/// # Errors
/// A server that cannot be reached or refuses is [`JournalError::Server`]; one that a journal
/// cannot be kept on as it is, [`JournalError::Unusable`], with what to do.
#[derive(Clone)]
pub struct PostgresJournal {
    clerk: Arc<Clerk>,
    cipher: Option<Arc<Cipher>>,
}

impl std::fmt::Debug for PostgresJournal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PostgresJournal").field("place", &self.clerk.place()).finish_non_exhaustive()
    }
}

impl PostgresJournal {
    /// Opens the journal in a database; its tables are made if they are not there.
    ///
    /// # Errors
    /// The server cannot be reached or refuses, the pooler before it is not in session mode, or the
    /// tables are of a newer format.
    pub async fn open(address: JournalAddress) -> Result<Self, JournalError> {
        let clerk = Clerk::start(address)?;
        let work = clerk.clone();
        clerk.run(async move { work.make().await }).await?;
        Ok(Self { clerk, cipher: None })
    }

    /// Opens the journal in a database if there is one: looking leaves nothing behind.
    ///
    /// # Errors
    /// As [`PostgresJournal::open`].
    pub async fn open_existing(address: JournalAddress) -> Result<Option<Self>, JournalError> {
        let clerk = Clerk::start(address)?;
        let work = clerk.clone();
        let found = clerk.run(async move { work.find().await }).await?;
        Ok(found.then_some(Self { clerk, cipher: None }))
    }

    /// Encrypts found contents with a key of 32 bytes in hexadecimal; without one none are kept.
    ///
    /// # Errors
    /// The key is not 64 hexadecimal digits.
    pub fn with_key(mut self, key: &str) -> Result<Self, JournalError> {
        let cipher = Cipher::from_hex(key).map_err(|error| JournalError::Unusable {
            reason: format!("the key for found contents cannot be used: {error}"),
            hint: sealed::KEY_HINT.into(),
        })?;
        self.cipher = Some(Arc::new(cipher));
        Ok(self)
    }

    /// Runs work on the journal's own threads: to its end, even if the caller is dropped.
    async fn run<T: Send + 'static, F>(&self, work: impl FnOnce(Arc<Clerk>) -> F) -> Result<T, JournalError>
    where
        F: Future<Output = Result<T, JournalError>> + Send + 'static,
    {
        self.clerk.run(work(self.clerk.clone())).await
    }
}

#[async_trait]
impl Journal for PostgresJournal {
    async fn acquire(&self, locks: &[LockName], patience: Duration) -> Result<Lease, JournalError> {
        acquire_within(locks, patience, |names| async move {
            let wanted = names.clone();
            let hold = self.run(|clerk| async move { PostgresHold::take(&clerk, &wanted).await }).await?;
            Ok(Lease::new(names, hold.epoch(), Box::new(hold)))
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
            .downcast_ref::<PostgresHold>()
            .map(PostgresHold::driver)
            .filter(|driver| driver.place() == self.clerk.place())
            .ok_or_else(|| JournalError::LeaseLost { reason: "it is a lease of another journal".into() })?;
        let (run, entries) = (run.clone(), entries.to_vec());
        self.run(|_| async move { driver.append(&run, at, entries).await }).await
    }

    async fn load(&self, run: &RunId) -> Result<Vec<Record>, JournalError> {
        let run = run.clone();
        self.run(|clerk| async move { rows::load(&clerk, &run).await }).await
    }

    async fn header(&self, run: &RunId) -> Result<Header, JournalError> {
        let run = run.clone();
        self.run(|clerk| async move { rows::header(&clerk, &run).await }).await
    }

    async fn runs(&self) -> Result<Vec<RunSummary>, JournalError> {
        self.run(|clerk| async move { summary::list(&clerk).await }).await
    }

    async fn post(&self, run: &RunId, request: &Request) -> Result<(), JournalError> {
        let (run, request) = (run.clone(), request.clone());
        self.run(|clerk| async move { requests::post(&clerk, &run, &request).await }).await
    }

    async fn requests(&self, run: &RunId) -> Result<Vec<Request>, JournalError> {
        let run = run.clone();
        self.run(|clerk| async move { requests::list(&clerk, &run).await }).await
    }

    async fn withdraw(&self, run: &RunId, id: &str) -> Result<(), JournalError> {
        let (run, id) = (run.clone(), id.to_owned());
        self.run(|clerk| async move { requests::withdraw(&clerk, &run, &id).await }).await
    }

    async fn sealed(&self, run: &RunId) -> Result<Arc<dyn SealedStorage>, JournalError> {
        Ok(Arc::new(PostgresSealed::new(self.clerk.clone(), self.cipher.clone(), run.clone())))
    }

    async fn verify(&self, run: &RunId) -> Result<Vec<Fault>, JournalError> {
        let run = run.clone();
        self.run(|clerk| async move { rows::verify(&clerk, &run).await }).await
    }

    fn home(&self) -> Vec<LockName> {
        self.clerk.home()
    }
}
