//! Contents found by a step and kept for its undo, outside the journal.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::StepError;

/// Refers to sealed contents by their SHA-256 digest; safe to keep in an undo record.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SealedRef {
    /// SHA-256 of the contents, in hexadecimal.
    pub sha256: String,
    /// Length of the contents in bytes.
    pub length: u64,
}

impl SealedRef {
    /// Refers to `contents`.
    pub fn of(contents: &[u8]) -> Self {
        Self { sha256: sha256_hex(contents), length: contents.len() as u64 }
    }
}

/// Returns the SHA-256 digest of `bytes` in hexadecimal.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Writes bytes in lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    // Every entry of a journal takes a digest or two: no formatting machinery.
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|half| char::from(DIGITS[usize::from(half)])).collect()
}

/// Keeps contents that may be secret, one store a run.
///
/// # Guarantees
/// `put` returns when the contents are durable; they are readable by the owner alone, and
/// encrypted where a key is configured. `get` returns exactly what was put, or an error.
/// The executor calls `clear` when the run is over.
///
/// # Errors
/// Storage that fails is *transient* or *unknown*; contents that do not match their digest are
/// *permanent*.
///
/// A second `put` of the same contents returns the same reference. After a crash, contents that
/// no entry refers to are left behind until `clear`.
#[async_trait]
pub trait SealedStorage: Send + Sync + 'static {
    /// Keeps `contents` until the run is over.
    async fn put(&self, contents: &[u8]) -> Result<SealedRef, StepError>;

    /// Returns what was put.
    async fn get(&self, reference: &SealedRef) -> Result<Vec<u8>, StepError>;

    /// Removes everything of this run.
    async fn clear(&self) -> Result<(), StepError>;
}

/// Keeps sealed contents in memory: for tests and for journals that do not survive the process.
#[derive(Default)]
pub struct MemorySealed {
    contents: Mutex<BTreeMap<SealedRef, Vec<u8>>>,
}

#[async_trait]
impl SealedStorage for MemorySealed {
    async fn put(&self, contents: &[u8]) -> Result<SealedRef, StepError> {
        let reference = SealedRef::of(contents);
        let mut kept = self.contents.lock().unwrap_or_else(PoisonError::into_inner);
        kept.insert(reference.clone(), contents.to_vec());
        Ok(reference)
    }

    async fn get(&self, reference: &SealedRef) -> Result<Vec<u8>, StepError> {
        let kept = self.contents.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get(reference)
            .cloned()
            .ok_or_else(|| StepError::permanent(format!("no sealed contents with digest {}", reference.sha256)))
    }

    async fn clear(&self) -> Result<(), StepError> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner).clear();
        Ok(())
    }
}
