//! The driver's side of the file journal: leases that are lost or left behind, disks that fail.
#![cfg(feature = "testkit")]
#![cfg(test)]

use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use upgrade_core::entry::{Demand, Request};
use upgrade_core::error::Class;
use upgrade_core::journal::conformance::{created, entered, undoing};
use upgrade_core::journal::{FileJournal, Journal, JournalError, Lease};
use upgrade_core::names::{LockName, RunId};
use upgrade_core::transition::RunState;

fn name() -> LockName {
    LockName::new("test", "lease").unwrap()
}

async fn lease(journal: &FileJournal) -> Lease {
    journal.acquire(&[name()], Duration::ZERO).await.unwrap()
}

fn lock_file(directory: &Path) -> PathBuf {
    std::fs::read_dir(directory.join("locks")).unwrap().next().unwrap().unwrap().path()
}

#[tokio::test]
async fn a_lease_whose_lock_file_was_removed_cannot_append() {
    let directory = tempfile::tempdir().unwrap();
    let journal = FileJournal::open(directory.path()).unwrap();
    let (run, old) = (RunId::generate(), lease(&journal).await);
    journal.append(&old, &run, 0, &[created(&run, "lost")]).await.unwrap();
    std::fs::remove_file(lock_file(directory.path())).unwrap();
    let new = lease(&journal).await;
    let answer = journal.append(&old, &run, 1, &[undoing("a")]).await;
    assert!(matches!(answer, Err(JournalError::LeaseLost { .. })), "{answer:?}");
    assert!(matches!(old.verify().await, Err(JournalError::LeaseLost { .. })));
    new.verify().await.unwrap();
    journal.append(&new, &run, 1, &[undoing("b")]).await.unwrap();
    drop(old);
    journal.append(&new, &run, 2, &[undoing("c")]).await.unwrap();
    assert_eq!(journal.load(&run).await.unwrap().len(), 3);
}

#[tokio::test]
async fn a_lease_of_an_older_epoch_cannot_append() {
    let directory = tempfile::tempdir().unwrap();
    let journal = FileJournal::open(directory.path()).unwrap();
    drop(lease(&journal).await);
    let path = lock_file(directory.path());
    let first = std::fs::read(&path).unwrap();
    let (run, held) = (RunId::generate(), lease(&journal).await);
    journal.append(&held, &run, 0, &[created(&run, "epoch")]).await.unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&first, 0).unwrap();
    match journal.append(&held, &run, 1, &[undoing("a")]).await {
        Err(JournalError::LeaseLost { reason }) => assert!(reason.contains("epoch 1, not 2"), "{reason}"),
        other => panic!("the lease is lost, not {other:?}"),
    }
}

#[tokio::test]
async fn leases_on_other_names_do_not_write_one_run() {
    let directory = tempfile::tempdir().unwrap();
    let (one, two) = (FileJournal::open(directory.path()).unwrap(), FileJournal::open(directory.path()).unwrap());
    let (run, first) = (RunId::generate(), lease(&one).await);
    one.append(&first, &run, 0, &[created(&run, "two-drivers")]).await.unwrap();
    let second = two.acquire(&[LockName::new("test", "other").unwrap()], Duration::ZERO).await.unwrap();
    let answer = two.append(&second, &run, 1, &[undoing("a")]).await;
    assert!(matches!(answer, Err(JournalError::Held { .. })), "{answer:?}");
    drop(first);
    two.append(&second, &run, 1, &[undoing("a")]).await.unwrap();
}

/// Not a test: the process that the next one kills.
#[tokio::test]
async fn holds_a_lease_until_it_is_killed() {
    let Ok(directory) = std::env::var("JOURNAL_TEST_HOLD") else { return };
    let journal = FileJournal::open(directory).unwrap();
    let (run, held) = (RunId::generate(), lease(&journal).await);
    journal.append(&held, &run, 0, &[created(&run, "killed")]).await.unwrap();
    println!("\nheld {run}");
    for at in 1.. {
        journal.append(&held, &run, at, &[undoing("a"), undoing("b")][..1 + (at % 2) as usize]).await.ok();
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[tokio::test]
async fn a_killed_holder_frees_its_lease_within_a_second() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "holds_a_lease_until_it_is_killed", "--nocapture"])
        .env("JOURNAL_TEST_HOLD", directory.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let held = output.lines().map(Result::unwrap).find_map(|line| line.strip_prefix("held ").map(str::to_owned));
    let run = RunId::try_from(held.unwrap()).unwrap();
    let journal = FileJournal::open(directory.path()).unwrap();
    match journal.acquire(&[name()], Duration::ZERO).await {
        Err(JournalError::Held { holder, .. }) => assert!(holder.contains(&format!("pid {}", child.id())), "{holder}"),
        other => panic!("another process holds it, not {other:?}"),
    }
    child.kill().unwrap();
    let start = Instant::now();
    let lease = journal.acquire(&[name()], Duration::from_secs(5)).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    child.wait().unwrap();
    let records = journal.load(&run).await.unwrap();
    journal.append(&lease, &run, records.len() as u64, &[undoing("after")]).await.unwrap();
    assert_eq!(journal.load(&run).await.unwrap().len(), records.len() + 1);
    assert_eq!(journal.verify(&run).await.unwrap(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_beside_a_driver_sees_whole_appends() {
    let directory = tempfile::tempdir().unwrap();
    let journal = FileJournal::open(directory.path()).unwrap();
    let (run, held) = (RunId::generate(), lease(&journal).await);
    journal.append(&held, &run, 0, &[created(&run, "read")]).await.unwrap();
    let (reader, read) = (FileJournal::open(directory.path()).unwrap(), run.clone());
    let reading = tokio::spawn(async move {
        let mut seen = 0;
        while seen < 1 + 300 * 3 {
            let records = reader.load(&read).await.unwrap();
            assert!(records.len() >= seen && records.len() % 3 == 1, "{} after {seen}", records.len());
            assert_eq!(reader.runs().await.unwrap()[0].damage, None);
            seen = records.len();
        }
    });
    for append in 0..300 {
        let entries = [undoing("a"), undoing(&"b".repeat(100)), undoing("c")];
        journal.append(&held, &run, 1 + append * 3, &entries).await.unwrap();
    }
    reading.await.unwrap();
}

struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// Mounts a file system of 64 KiB; that takes root.
    fn mount() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"]).arg(directory.path()).output();
        if mount.is_ok_and(|output| output.status.success()) {
            return Some(Self(directory));
        }
        eprintln!("SKIPPED: a file system of 64 KiB cannot be mounted without root");
        None
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn a_full_disk_halts_the_run_and_room_lets_it_go_on() {
    let Some(disk) = SmallDisk::mount() else { return };
    std::fs::write(disk.0.path().join("ballast"), vec![1; 8192]).unwrap();
    let journal = FileJournal::open(disk.0.path().join("journal")).unwrap();
    let (run, held) = (RunId::generate(), lease(&journal).await);
    let mut kept = journal.append(&held, &run, 0, &[created(&run, "full")]).await.unwrap();
    let error = loop {
        match journal.append(&held, &run, kept.len() as u64, &[undoing(&"x".repeat(90))]).await {
            Ok(records) => kept.extend(records),
            Err(error) => break error,
        }
        assert!(kept.len() < 1000, "64 KiB hold no thousand records");
    };
    assert!(kept.len() > 20, "without space ahead, records still fit: {}", kept.len());
    match &error {
        JournalError::Storage { source, .. } => assert_eq!(source.kind(), std::io::ErrorKind::StorageFull),
        other => panic!("the disk is full, not {other}"),
    }
    assert!(error.hint().contains("make room"), "{}", error.hint());
    std::fs::remove_file(disk.0.path().join("ballast")).unwrap();
    let again = journal.append(&held, &run, kept.len() as u64, &[undoing("a")]).await;
    assert!(matches!(again, Err(JournalError::Poisoned)), "never retried as success: {again:?}");
    assert!(matches!(held.verify().await, Err(JournalError::Poisoned)));
    drop(held);
    let held = lease(&journal).await;
    let found = journal.load(&run).await.unwrap();
    assert!(found.len() == kept.len() || found.len() == kept.len() + 1, "{} of {}", found.len(), kept.len());
    assert_eq!(found[..kept.len()], kept);
    journal.append(&held, &run, found.len() as u64, &[undoing("resumed")]).await.unwrap();
    drop(held);
    assert_eq!(journal.verify(&run).await.unwrap(), []);
}

#[tokio::test]
async fn everything_is_readable_by_the_owner_alone() {
    let directory = tempfile::tempdir().unwrap();
    let home = directory.path().join("state");
    let journal = FileJournal::open(&home).unwrap();
    let (run, held) = (RunId::generate(), lease(&journal).await);
    journal.append(&held, &run, 0, &[created(&run, "modes"), entered(RunState::Rejected)]).await.unwrap();
    journal.post(&run, &Request::new(Demand::Resume)).await.unwrap();
    journal.sealed(&run).await.unwrap().put(b"found").await.unwrap();
    let mut open = vec![home];
    let mut files = 0;
    while let Some(path) = open.pop() {
        let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        if path.is_dir() {
            assert_eq!(mode, 0o700, "{path:?}");
            open.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            files += 1;
            assert_eq!(mode, 0o600, "{path:?}");
        }
    }
    assert_eq!(files, 4);
    assert!(journal.home()[0].as_str().ends_with("/state"));
}

#[tokio::test]
async fn sealed_contents_that_were_changed_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, run) = (FileJournal::open(directory.path()).unwrap(), RunId::generate());
    let sealed = journal.sealed(&run).await.unwrap();
    let reference = sealed.put(b"PASSWORD=old").await.unwrap();
    let path = directory.path().join(format!("sealed/{run}/{}", reference.sha256));
    assert_eq!(std::fs::read(&path).unwrap(), b"PASSWORD=old");
    std::fs::write(&path, b"PASSWORD=new").unwrap();
    assert_eq!(sealed.get(&reference).await.unwrap_err().class(), Class::Permanent);
    std::fs::remove_file(&path).unwrap();
    let gone = sealed.get(&reference).await.unwrap_err();
    assert!(gone.class() == Class::Permanent && gone.hint().is_some());
    let mut outside = reference;
    outside.sha256 = "../../runs".into();
    assert_eq!(sealed.get(&outside).await.unwrap_err().class(), Class::Permanent);
}

#[cfg(feature = "encryption")]
#[tokio::test]
async fn sealed_contents_are_encrypted_under_a_key() {
    let directory = tempfile::tempdir().unwrap();
    let (plain, run) = (FileJournal::open(directory.path()).unwrap(), RunId::generate());
    let keyed = plain.clone().with_key(&"a1".repeat(32)).unwrap();
    let sealed = keyed.sealed(&run).await.unwrap();
    let reference = sealed.put(b"PASSWORD=old").await.unwrap();
    let folder = directory.path().join(format!("sealed/{run}"));
    let path = std::fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    let mut kept = std::fs::read(&path).unwrap();
    assert!(!kept.windows(8).any(|window| window == b"PASSWORD"));
    assert_eq!(sealed.get(&reference).await.unwrap(), b"PASSWORD=old");
    let without = plain.sealed(&run).await.unwrap().get(&reference).await.unwrap_err();
    assert!(without.hint().unwrap().contains("UPGRADE_SEAL_KEY"));
    let other = plain.clone().with_key(&"a2".repeat(32)).unwrap();
    assert!(other.sealed(&run).await.unwrap().get(&reference).await.is_err());
    *kept.last_mut().unwrap() ^= 1;
    std::fs::write(&path, kept).unwrap();
    assert!(sealed.get(&reference).await.is_err());
    for key in ["", "xyz", &"zz".repeat(32)] {
        let error = plain.clone().with_key(key).unwrap_err();
        assert!(key.is_empty() || !format!("{error:?}").contains(key), "no key in an error");
    }
}
