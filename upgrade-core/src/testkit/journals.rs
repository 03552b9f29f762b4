//! Journals that fail on purpose.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Notify;

use crate::entry::{Entry, Header, Record, Request};
use crate::journal::{Fault, Journal, JournalError, Lease, RunSummary};
use crate::names::{LockName, RunId, Seq};
use crate::sealed::SealedStorage;

/// Does something else than a journal does at its appends, and the same at all other calls.
#[async_trait]
pub trait AppendThrough: Send + Sync + 'static {
    /// Returns the journal that answers all other calls.
    fn inner(&self) -> &dyn Journal;

    /// Appends, or fails to: what [`Journal::append`] is called for.
    async fn append_through(
        &self,
        lease: &Lease,
        run: &RunId,
        at: Seq,
        entries: &[Entry],
    ) -> Result<Vec<Record>, JournalError>;
}

#[async_trait]
impl<J: AppendThrough> Journal for J {
    async fn acquire(&self, locks: &[LockName], patience: Duration) -> Result<Lease, JournalError> {
        self.inner().acquire(locks, patience).await
    }

    async fn append(
        &self,
        lease: &Lease,
        run: &RunId,
        at: Seq,
        entries: &[Entry],
    ) -> Result<Vec<Record>, JournalError> {
        self.append_through(lease, run, at, entries).await
    }

    async fn load(&self, run: &RunId) -> Result<Vec<Record>, JournalError> {
        self.inner().load(run).await
    }

    async fn header(&self, run: &RunId) -> Result<Header, JournalError> {
        self.inner().header(run).await
    }

    async fn runs(&self) -> Result<Vec<RunSummary>, JournalError> {
        self.inner().runs().await
    }

    async fn post(&self, run: &RunId, request: &Request) -> Result<(), JournalError> {
        self.inner().post(run, request).await
    }

    async fn requests(&self, run: &RunId) -> Result<Vec<Request>, JournalError> {
        self.inner().requests(run).await
    }

    async fn withdraw(&self, run: &RunId, id: &str) -> Result<(), JournalError> {
        self.inner().withdraw(run, id).await
    }

    async fn sealed(&self, run: &RunId) -> Result<Arc<dyn SealedStorage>, JournalError> {
        self.inner().sealed(run).await
    }

    async fn verify(&self, run: &RunId) -> Result<Vec<Fault>, JournalError> {
        self.inner().verify(run).await
    }

    fn home(&self) -> Vec<LockName> {
        self.inner().home()
    }
}

/// Says on which side of its durability an append dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Before,
    After,
}

/// Dies at one append: that append never returns, and `died` is told.
pub(crate) struct Dying {
    pub(crate) inner: Arc<dyn Journal>,
    /// The append to die at, from one; zero never dies.
    pub(crate) at: u64,
    pub(crate) side: Side,
    pub(crate) died: Arc<Notify>,
    pub(crate) appends: AtomicU64,
    /// Whether undo records are lost on the way: a seeded defect.
    pub(crate) drops_undo: bool,
}

impl Dying {
    pub(crate) fn new(inner: Arc<dyn Journal>, at: u64, side: Side, drops_undo: bool) -> Self {
        Self { inner, at, side, died: Arc::default(), appends: AtomicU64::new(0), drops_undo }
    }

    async fn die<T>(&self) -> T {
        self.died.notify_one();
        std::future::pending().await
    }
}

fn without_undo(entries: &[Entry]) -> Vec<Entry> {
    let mut entries = entries.to_vec();
    for entry in &mut entries {
        if let Entry::StepPrepared { undo, .. } = entry {
            undo.value = serde_json::Value::Null;
        }
    }
    entries
}

#[async_trait]
impl AppendThrough for Dying {
    fn inner(&self) -> &dyn Journal {
        &*self.inner
    }

    async fn append_through(
        &self,
        lease: &Lease,
        run: &RunId,
        at: Seq,
        entries: &[Entry],
    ) -> Result<Vec<Record>, JournalError> {
        let count = self.appends.fetch_add(1, Ordering::SeqCst) + 1;
        if count == self.at && self.side == Side::Before {
            return self.die().await;
        }
        let kept = if self.drops_undo { without_undo(entries) } else { entries.to_vec() };
        let records = self.inner.append(lease, run, at, &kept).await?;
        if count == self.at {
            return self.die().await;
        }
        Ok(records)
    }
}
