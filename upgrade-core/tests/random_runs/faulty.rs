//! A journal that dies or fails at one append, before or after it is durable.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use async_trait::async_trait;
use tokio::sync::Notify;
use upgrade_core::entry::{Entry, Record};
use upgrade_core::journal::{Journal, JournalError, Lease, MemoryJournal};
use upgrade_core::names::{RunId, Seq};
use upgrade_core::testkit::AppendThrough;

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
impl AppendThrough for Faulty {
    fn inner(&self) -> &dyn Journal {
        &self.inner
    }

    async fn append_through(
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
}
