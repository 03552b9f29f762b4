//! What is kept: the contract of every journal, damage found, secrets not in the clear.

use std::sync::Arc;
use std::time::Duration;

use upgrade_core::journal::{Journal, JournalError, conformance};
use upgrade_core::names::{LockName, RunId, Seq};
use upgrade_postgres::PostgresJournal;
use upgrade_testbed::postgres::{Version, shared};

use super::{address, open};

#[tokio::test(flavor = "multi_thread")]
async fn it_keeps_the_contract_of_every_journal_on_every_version() {
    for version in Version::ALL {
        let Some(server) = shared(version) else { continue };
        let database = server.database();
        let journal = open(&database.url()).await;
        conformance::all(|| Arc::new(journal.clone())).await;
        assert_eq!(database.text("SELECT count(*) FROM upgrade_journal.leases"), "0", "what was let go is gone");
    }
}

#[tokio::test]
async fn it_keeps_the_contract_on_one_thread_and_with_handles_of_their_own() {
    let Some(server) = shared(Version::V15) else { return };
    let database = server.database();
    let mut handles = Vec::new();
    for _ in 0..200 {
        handles.push(Arc::new(open(&format!("{}?schema=Odd%20%22name", database.url())).await));
        if handles.len() == 24 {
            break;
        }
    }
    let next = std::sync::atomic::AtomicUsize::new(0);
    conformance::all(|| handles[next.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % handles.len()].clone()).await;
}

#[tokio::test]
async fn looking_leaves_nothing_behind() {
    let Some(server) = shared(Version::V15) else { return };
    let database = server.database();
    assert!(PostgresJournal::open_existing(address(&database.url())).await.unwrap().is_none());
    assert_eq!(database.text("SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'upgrade%'"), "0");
    open(&database.url()).await;
    assert!(PostgresJournal::open_existing(address(&database.url())).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_who_come_first_make_the_tables_once() {
    let Some(server) = shared(Version::V15) else { return };
    let database = server.database();
    let url = database.url();
    let opening: Vec<_> = (0..12).map(|_| tokio::spawn(PostgresJournal::open(address(&url)))).collect();
    for opened in opening {
        opened.await.unwrap().unwrap();
    }
    assert_eq!(database.text("SELECT version FROM upgrade_journal.format"), "1");
}

/// A run with entries whose text a database would rather spell otherwise.
async fn run_of_seven(journal: &PostgresJournal) -> RunId {
    let (run, lease) =
        (RunId::generate(), journal.acquire(&[LockName::new("test", "seven").unwrap()], Duration::ZERO).await.unwrap());
    journal.append(&lease, &run, 0, &[conformance::created(&run, "seven")]).await.unwrap();
    for at in 1..4_u64 {
        let entries = [conformance::undoing(&format!("s{at}")), conformance::undoing("again")];
        journal.append(&lease, &run, 2 * at - 1, &entries).await.unwrap();
    }
    run
}

#[tokio::test]
async fn what_is_changed_deleted_inserted_or_cut_off_is_found_with_its_line() {
    let Some(server) = shared(Version::V16) else { return };
    let database = server.database();
    let journal = open(&database.url()).await;
    let damages: [(&str, u64); 8] = [
        ("UPDATE records SET entry = replace(entry, 's2', 's9') WHERE seq = 3", 4),
        ("UPDATE records SET at = '2001-01-01T00:00:00Z' WHERE seq = 2", 3),
        ("UPDATE records SET prev = digest WHERE seq = 4", 5),
        ("DELETE FROM records WHERE seq = 3", 5),
        ("DELETE FROM records WHERE seq = 0", 2),
        ("DELETE FROM records WHERE seq = 6", 6),
        ("INSERT INTO records SELECT run, 7, at, prev, entry, digest FROM records WHERE seq = 6", 8),
        ("UPDATE runs SET entries = 5", 7),
    ];
    for (damage, line) in damages {
        let run = run_of_seven(&journal).await;
        assert_eq!(journal.verify(&run).await.unwrap(), [], "whole before: {damage}");
        database.execute(&format!("SET search_path = upgrade_journal; {damage};"));
        match journal.load(&run).await {
            Err(JournalError::Damaged { line: found, place, .. }) => {
                assert_eq!(found, line, "{damage}");
                assert!(place.contains("upgrade_journal") && place.contains(run.as_str()), "{place}");
            }
            other => panic!("{damage}: {other:?}"),
        }
        assert_eq!(journal.verify(&run).await.unwrap()[0].line, line, "{damage}");
        let listed = journal.runs().await.unwrap();
        assert!(listed.iter().all(|summary| summary.damage.is_some()), "{damage}: {listed:?}");
        // Nor does a driver go on from it.
        let lease = journal.acquire(&[LockName::new("test", "on").unwrap()], Duration::ZERO).await.unwrap();
        let on = journal.append(&lease, &run, 7, &[conformance::undoing("x")]).await;
        assert!(matches!(on, Err(JournalError::Damaged { .. })), "{damage}: {on:?}");
        database.execute("SET search_path = upgrade_journal; TRUNCATE runs, records");
    }
}

#[tokio::test]
async fn records_have_the_text_and_the_digests_of_a_file_journal() {
    let Some(server) = shared(Version::V15) else { return };
    let database = server.database();
    let journal = open(&database.url()).await;
    let run = run_of_seven(&journal).await;
    // What anybody can compute with the tools at hand, here with those of the database itself.
    let digests = database.text(
        "SELECT bool_and(digest = encode(sha256(convert_to(format(
            '{\"seq\":%s,\"at\":\"%s\",\"prev\":\"%s\",\"entry\":%s}', seq, at, prev, entry), 'UTF8')), 'hex'))
         FROM upgrade_journal.records",
    );
    assert_eq!(digests, "t");
    let directory = tempfile::tempdir().unwrap();
    let file = upgrade_core::journal::FileJournal::open(directory.path()).unwrap();
    let lease = file.acquire(&[LockName::new("test", "file").unwrap()], Duration::ZERO).await.unwrap();
    let entries: Vec<_> = journal.load(&run).await.unwrap().into_iter().map(|record| record.entry).collect();
    file.append(&lease, &run, 0, &entries).await.unwrap();
    drop(lease);
    let text = std::fs::read_to_string(directory.path().join(format!("runs/{run}.jsonl"))).unwrap();
    let kept = database.text("SELECT entry FROM upgrade_journal.records ORDER BY seq");
    for entry in kept.lines() {
        assert!(text.contains(entry), "{entry}");
    }
}

#[tokio::test]
async fn a_journal_of_a_newer_format_is_refused() {
    let Some(server) = shared(Version::V15) else { return };
    let database = server.database();
    open(&database.url()).await;
    database.execute("UPDATE upgrade_journal.format SET version = 7");
    let refused = PostgresJournal::open(address(&database.url())).await;
    assert!(matches!(refused, Err(JournalError::Format { found: 7, known: 1, .. })), "{refused:?}");
    database.execute("DELETE FROM upgrade_journal.format");
    let refused = PostgresJournal::open_existing(address(&database.url())).await;
    assert!(matches!(refused, Err(JournalError::Damaged { .. })), "{refused:?}");
}

#[tokio::test]
async fn found_contents_are_encrypted_or_not_kept() {
    let Some(server) = shared(Version::V15) else { return };
    let database = server.database();
    let (run, secret) = (RunId::generate(), b"PASSWORD=tiger".as_slice());
    let plain = PostgresJournal::open(address(&database.url())).await.unwrap();
    let refused = plain.sealed(&run).await.unwrap().put(secret).await.unwrap_err();
    assert!(refused.hint().unwrap().contains("UPGRADE_SEAL_KEY"), "{refused:?}");
    assert_eq!(database.text("SELECT count(*) FROM upgrade_journal.sealed"), "0");

    let journal = open(&database.url()).await;
    let reference = journal.sealed(&run).await.unwrap().put(secret).await.unwrap();
    let kept = database.text("SELECT encode(contents, 'escape') FROM upgrade_journal.sealed");
    assert!(kept.starts_with("upgrade-sealed-1") && !kept.contains("tiger"), "{kept}");
    assert_eq!(journal.sealed(&run).await.unwrap().get(&reference).await.unwrap(), secret);
    for (handle, said) in
        [(plain.clone(), "there is no key"), (plain.with_key(&"f".repeat(64)).unwrap(), "cannot be decrypted")]
    {
        let refused = handle.sealed(&run).await.unwrap().get(&reference).await.unwrap_err();
        assert!(refused.to_string().contains(said), "{refused}");
        assert!(refused.hint().unwrap().contains("UPGRADE_SEAL_KEY"));
    }
    let short = open(&database.url()).await.with_key("abc").unwrap_err();
    assert!(short.hint().contains("openssl rand"), "{short:?}");
}

#[tokio::test]
async fn a_long_run_is_appended_and_loaded() {
    const ENTRIES: Seq = 3000;
    let Some(server) = shared(Version::V15) else { return };
    let database = server.database();
    let journal = open(&database.url()).await;
    let run = RunId::generate();
    let lease = journal.acquire(&[LockName::new("test", "long").unwrap()], Duration::ZERO).await.unwrap();
    journal.append(&lease, &run, 0, &[conformance::created(&run, "long")]).await.unwrap();
    let entries: Vec<_> = (1..ENTRIES).map(|n| conformance::undoing(&format!("s{n}"))).collect();
    for (number, chunk) in entries.chunks(500).enumerate() {
        journal.append(&lease, &run, 1 + 500 * number as Seq, chunk).await.unwrap();
    }
    assert_eq!(journal.load(&run).await.unwrap().len() as Seq, ENTRIES);
    assert_eq!(journal.header(&run).await.unwrap().run, run);
}
