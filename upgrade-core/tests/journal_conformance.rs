//! The journals of this crate pass the suite that every journal passes.
#![cfg(feature = "testkit")]
#![cfg(test)]

use std::sync::Arc;

use upgrade_core::journal::{FileJournal, MemoryJournal, conformance};

#[tokio::test(flavor = "multi_thread")]
async fn the_memory_journal_conforms() {
    let journal = MemoryJournal::new();
    conformance::all(|| Arc::new(journal.clone())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_file_journal_conforms() {
    let directory = tempfile::tempdir().unwrap();
    conformance::all(|| Arc::new(FileJournal::open(directory.path()).unwrap())).await;
}

#[tokio::test(flavor = "current_thread")]
async fn the_file_journal_conforms_on_one_thread() {
    let directory = tempfile::tempdir().unwrap();
    conformance::all(|| Arc::new(FileJournal::open(directory.path()).unwrap())).await;
}

#[cfg(feature = "encryption")]
#[tokio::test]
async fn the_file_journal_conforms_with_a_key() {
    let directory = tempfile::tempdir().unwrap();
    let open = || FileJournal::open(directory.path()).unwrap().with_key(&"5a".repeat(32)).unwrap();
    conformance::all(|| Arc::new(open())).await;
}
