//! A journal that dies or fails at one append, before or after it is durable.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Notify;
use upgrade_core::entry::{Entry, Record, Request};
use upgrade_core::journal::{Journal, JournalError, Lease, MemoryJournal, RunSummary};
use upgrade_core::names::{LockName, RunId, Seq};
use upgrade_core::sealed::SealedStorage;

/// What happens at the chosen append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Never,
    Death,
    Failure,
}

pub(crate) struct Faulty {
    pub(crate) inner: MemoryJournal,
    pub(crate) end: End,
    /// Counted from one.
    pub(crate) at: u64,
    pub(crate) durable: bool,
    pub(crate) died: Arc<Notify>,
    pub(crate) appends: AtomicU64,
    pub(crate) failed: AtomicBool,
}

impl Faulty {
    pub(crate) fn new(inner: MemoryJournal, end: End, at: u64, durable: bool) -> Self {
        Self { inner, end, at, durable, died: Arc::default(), appends: 0.into(), failed: false.into() }
    }
}

#[async_trait]
impl Journal for Faulty {
    async fn acquire(&self, locks: &[LockName], patience: Duration) -> Result<Lease, JournalError> {
        self.inner.acquire(locks, patience).await
    }

    async fn append(
        &self,
        lease: &Lease,
        run: &RunId,
        at: Seq,
        entries: &[Entry],
    ) -> Result<Vec<Record>, JournalError> {
        if self.failed.load(Ordering::SeqCst) {
            return Err(JournalError::Poisoned);
        }
        let strikes = self.appends.fetch_add(1, Ordering::SeqCst) + 1 == self.at && self.end != End::Never;
        let kept = match strikes && !self.durable {
            true => Vec::new(),
            false => self.inner.append(lease, run, at, entries).await?,
        };
        match self.end {
            End::Death if strikes => {
                self.died.notify_one();
                std::future::pending().await
            }
            End::Failure if strikes => {
                self.failed.store(true, Ordering::SeqCst);
                self.died.notify_one();
                let source = std::io::Error::from(std::io::ErrorKind::StorageFull);
                Err(JournalError::Storage { action: "write", path: "seeded".into(), source })
            }
            _ => Ok(kept),
        }
    }

    async fn load(&self, run: &RunId) -> Result<Vec<Record>, JournalError> {
        self.inner.load(run).await
    }

    async fn runs(&self) -> Result<Vec<RunSummary>, JournalError> {
        self.inner.runs().await
    }

    async fn post(&self, run: &RunId, request: &Request) -> Result<(), JournalError> {
        self.inner.post(run, request).await
    }

    async fn requests(&self, run: &RunId) -> Result<Vec<Request>, JournalError> {
        self.inner.requests(run).await
    }

    async fn withdraw(&self, run: &RunId, id: &str) -> Result<(), JournalError> {
        self.inner.withdraw(run, id).await
    }

    async fn sealed(&self, run: &RunId) -> Result<Arc<dyn SealedStorage>, JournalError> {
        self.inner.sealed(run).await
    }

    fn home(&self) -> Option<LockName> {
        self.inner.home()
    }
}
