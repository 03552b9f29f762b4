//! A journal in memory: for tests, and for runs that need not survive their process.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;

use super::chain::chain;
use super::patience::acquire_within;
use super::{Hold, Journal, JournalError, Lease, RunSummary};
use crate::entry::{Entry, Record, Request};
use crate::names::{Actor, LockName, RunId, Seq};
use crate::sealed::{MemorySealed, SealedStorage};

/// Keeps a journal in memory; clones share it, with leases that exclude each other.
///
/// # Guarantees
/// Those of [`Journal`], as far as they do not speak of a crash.
#[derive(Clone, Default)]
pub struct MemoryJournal {
    kept: Arc<Mutex<Kept>>,
}

#[derive(Default)]
struct Kept {
    runs: BTreeMap<RunId, Vec<Record>>,
    requests: BTreeMap<RunId, BTreeMap<String, Request>>,
    sealed: BTreeMap<RunId, Arc<MemorySealed>>,
    held: BTreeMap<LockName, u64>,
    epoch: u64,
}

impl std::fmt::Debug for MemoryJournal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryJournal").finish_non_exhaustive()
    }
}

impl MemoryJournal {
    /// Makes an empty journal.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes every lease away from its holder, as the loss of a connection would; for tests.
    pub fn revoke_leases(&self) {
        self.kept().held.clear();
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_acquire(&self, names: &[LockName]) -> Result<Lease, JournalError> {
        let mut kept = self.kept();
        if let Some(lock) = names.iter().find(|name| kept.held.keys().any(|held| held.overlaps(name))) {
            return Err(JournalError::Held { lock: lock.clone(), holder: Actor::current().to_string() });
        }
        kept.epoch += 1;
        let epoch = kept.epoch;
        kept.held.extend(names.iter().map(|name| (name.clone(), epoch)));
        let hold = MemoryHold { journal: self.clone(), names: names.to_vec(), epoch };
        Ok(Lease::new(names.to_vec(), epoch, Box::new(hold)))
    }
}

#[async_trait]
impl Journal for MemoryJournal {
    async fn acquire(&self, locks: &[LockName], patience: Duration) -> Result<Lease, JournalError> {
        acquire_within(locks, patience, |names| {
            let taken = self.try_acquire(&names);
            async { taken }
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
        let mut kept = self.kept();
        match lease.hold().as_any().downcast_ref::<MemoryHold>() {
            Some(hold) if Arc::ptr_eq(&hold.journal.kept, &self.kept) => hold.check(&kept)?,
            _ => return Err(JournalError::LeaseLost { reason: "it is a lease of another journal".into() }),
        }
        let records = kept.runs.get(run).map_or(&[][..], Vec::as_slice);
        let actual = records.len() as Seq;
        if actual != at {
            return Err(JournalError::Sequence { run: run.clone(), expected: at, actual });
        }
        if entries.is_empty() {
            return Ok(Vec::new());
        }
        let prev = records.last().map(|record| record.digest.clone()).unwrap_or_default();
        let chained = chain(at, &prev, Timestamp::now(), entries.to_vec()).map_err(|error| JournalError::Storage {
            action: "write an entry of",
            path: run.as_str().into(),
            source: error.into(),
        })?;
        kept.runs.entry(run.clone()).or_default().extend(chained.records.iter().cloned());
        Ok(chained.records)
    }

    async fn load(&self, run: &RunId) -> Result<Vec<Record>, JournalError> {
        self.kept().runs.get(run).cloned().ok_or_else(|| JournalError::NoRun(run.clone()))
    }

    async fn runs(&self) -> Result<Vec<RunSummary>, JournalError> {
        let mut runs: Vec<_> = self.kept().runs.iter().map(|(run, records)| RunSummary::of(run, records)).collect();
        runs.sort_by(|a, b| (a.created, &a.run).cmp(&(b.created, &b.run)));
        Ok(runs)
    }

    async fn post(&self, run: &RunId, request: &Request) -> Result<(), JournalError> {
        let mut kept = self.kept();
        if !kept.runs.contains_key(run) {
            return Err(JournalError::NoRun(run.clone()));
        }
        kept.requests.entry(run.clone()).or_default().insert(request.id.clone(), request.clone());
        Ok(())
    }

    async fn requests(&self, run: &RunId) -> Result<Vec<Request>, JournalError> {
        Ok(self.kept().requests.get(run).map(|requests| requests.values().cloned().collect()).unwrap_or_default())
    }

    async fn withdraw(&self, run: &RunId, id: &str) -> Result<(), JournalError> {
        if let Some(requests) = self.kept().requests.get_mut(run) {
            requests.remove(id);
        }
        Ok(())
    }

    async fn sealed(&self, run: &RunId) -> Result<Arc<dyn SealedStorage>, JournalError> {
        Ok(self.kept().sealed.entry(run.clone()).or_default().clone())
    }

    fn home(&self) -> Vec<LockName> {
        Vec::new()
    }
}

struct MemoryHold {
    journal: MemoryJournal,
    names: Vec<LockName>,
    epoch: u64,
}

impl MemoryHold {
    fn check(&self, kept: &Kept) -> Result<(), JournalError> {
        match self.names.iter().find(|name| kept.held.get(name) != Some(&self.epoch)) {
            Some(name) => Err(JournalError::LeaseLost { reason: format!("{name} was taken away") }),
            None => Ok(()),
        }
    }
}

impl Drop for MemoryHold {
    fn drop(&mut self) {
        // Only its own: after a revocation somebody else may hold the names.
        self.journal.kept().held.retain(|_, epoch| *epoch != self.epoch);
    }
}

#[async_trait]
impl Hold for MemoryHold {
    async fn verify(&self) -> Result<(), JournalError> {
        self.check(&self.journal.kept())
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
