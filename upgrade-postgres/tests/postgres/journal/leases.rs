//! One driver: whoever lost its lease writes nothing, and whoever wants it does not wait for long.

use std::time::{Duration, Instant};

use upgrade_core::journal::{Journal, JournalError, Lease, conformance};
use upgrade_core::names::{LockName, RunId};
use upgrade_postgres::PostgresJournal;
use upgrade_testbed::postgres::{Database, Version, shared};

use super::open;

fn name(text: &str) -> LockName {
    LockName::new("test", text).unwrap()
}

async fn take(journal: &PostgresJournal, text: &str) -> Lease {
    journal.acquire(&[name(text)], Duration::ZERO).await.unwrap()
}

/// Ends the sessions that hold leases, as a network that fails or an administrator does.
fn end_holders(database: &Database) {
    let ended = database.text(
        "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_locks WHERE locktype = 'advisory' \
         AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
    );
    assert_ne!(ended, "0");
}

fn refused(answer: Result<Vec<upgrade_core::entry::Record>, JournalError>) -> JournalError {
    match answer {
        Err(error @ (JournalError::LeaseLost { .. } | JournalError::Sequence { .. } | JournalError::Poisoned)) => error,
        other => panic!("a lease that was lost, not {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_holder_is_named() {
    let Some(server) = shared(Version::V15) else { return };
    let database = server.database();
    let (one, two) = (open(&database.url()).await, open(&database.url()).await);
    let _held = take(&one, "a").await;
    match two.acquire(&[name("a")], Duration::ZERO).await {
        Err(JournalError::Held { lock, holder }) => {
            assert_eq!(lock, name("a"));
            assert!(holder.contains(&format!("(pid {})", std::process::id())), "{holder}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_journals_in_one_database_have_leases_of_their_own() {
    let Some(server) = shared(Version::V15) else { return };
    let database = server.database();
    let one = open(&database.url()).await;
    let two = open(&format!("{}?schema=other", database.url())).await;
    let first = take(&one, "a").await;
    let _second = take(&two, "a").await;
    let foreign = two.append(&first, &RunId::generate(), 0, &[]).await;
    assert!(matches!(foreign, Err(JournalError::LeaseLost { .. })), "{foreign:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_of_an_ended_connection_is_free_and_its_driver_writes_nothing_more() {
    let Some(server) = shared(Version::V16) else { return };
    let database = server.database();
    let (one, two) = (open(&database.url()).await, open(&database.url()).await);
    let run = RunId::generate();
    let old = take(&one, "a").await;
    one.append(&old, &run, 0, &[conformance::created(&run, "lost")]).await.unwrap();
    end_holders(&database);
    let began = Instant::now();
    let new = two.acquire(&[name("a")], Duration::from_secs(5)).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    assert!(new.epoch() > old.epoch());
    // The one that does not know it yet, and then once more.
    let error = refused(one.append(&old, &run, 1, &[conformance::undoing("old")]).await);
    assert!(matches!(&error, JournalError::LeaseLost { reason } if reason.contains("connection")), "{error}");
    refused(one.append(&old, &run, 1, &[conformance::undoing("old")]).await);
    assert!(old.verify().await.is_err());
    two.append(&new, &run, 1, &[conformance::undoing("new")]).await.unwrap();
    drop(old);
    new.verify().await.unwrap();
    assert_eq!(two.load(&run).await.unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_epoch_is_checked_even_where_the_connection_lives() {
    let Some(server) = shared(Version::V15) else { return };
    let database = server.database();
    let (one, two) = (open(&database.url()).await, open(&database.url()).await);
    let run = RunId::generate();
    let old = take(&one, "a").await;
    one.append(&old, &run, 0, &[conformance::created(&run, "epoch")]).await.unwrap();
    // As after a restored backup: the row is gone, and nobody told the driver.
    database.execute("DELETE FROM upgrade_journal.leases");
    let verified = old.verify().await;
    assert!(matches!(verified, Err(JournalError::LeaseLost { .. })), "{verified:?}");
    let old = take(&one, "b").await;
    database.execute("DELETE FROM upgrade_journal.leases");
    let new = take(&two, "b").await;
    let error = refused(one.append(&old, &run, 1, &[conformance::undoing("old")]).await);
    assert!(matches!(error, JournalError::LeaseLost { .. }), "{error}");
    two.append(&new, &run, 1, &[conformance::undoing("new")]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_on_other_names_do_not_let_two_drivers_write_one_run() {
    let Some(server) = shared(Version::V15) else { return };
    let database = server.database();
    let (one, two) = (open(&database.url()).await, open(&database.url()).await);
    let run = RunId::generate();
    let first = take(&one, "a").await;
    let second = take(&two, "b").await;
    one.append(&first, &run, 0, &[conformance::created(&run, "one")]).await.unwrap();
    match two.append(&second, &run, 1, &[conformance::undoing("x")]).await {
        Err(JournalError::Held { lock, .. }) => assert_eq!(lock.as_str(), format!("run:{run}")),
        other => panic!("{other:?}"),
    }
    drop(first);
    two.append(&second, &run, 1, &[conformance::undoing("x")]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn appends_of_one_lease_that_race_are_made_one_after_the_other() {
    let Some(server) = shared(Version::V18) else { return };
    let database = server.database();
    let journal = open(&database.url()).await;
    let lease = std::sync::Arc::new(take(&journal, "a").await);
    let runs: Vec<RunId> = (0..8).map(|_| RunId::generate()).collect();
    let mut drivers = tokio::task::JoinSet::new();
    for run in runs.clone() {
        let (journal, lease) = (journal.clone(), lease.clone());
        drivers.spawn(async move {
            journal.append(&lease, &run, 0, &[conformance::created(&run, "race")]).await.unwrap();
            for at in 1..20 {
                journal.append(&lease, &run, at, &[conformance::undoing("x")]).await.unwrap();
            }
        });
    }
    while let Some(driver) = drivers.join_next().await {
        driver.unwrap();
    }
    for run in runs {
        assert_eq!(journal.load(&run).await.unwrap().len(), 20);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_append_whose_caller_goes_away_is_made_or_not_and_never_half() {
    let Some(server) = shared(Version::V15) else { return };
    let database = server.database();
    let journal = open(&database.url()).await;
    let run = RunId::generate();
    let lease = take(&journal, "a").await;
    journal.append(&lease, &run, 0, &[conformance::created(&run, "cut")]).await.unwrap();
    for _ in 0..30 {
        let at = journal.load(&run).await.unwrap().len() as u64;
        let entries = [conformance::undoing("x"), conformance::undoing("y")];
        let _ = tokio::time::timeout(Duration::from_micros(300), journal.append(&lease, &run, at, &entries)).await;
        // The next in turn finds the run as the one before left it.
        match journal.append(&lease, &run, at, &[]).await {
            Ok(_) => {}
            Err(JournalError::Sequence { actual, .. }) => assert_eq!(actual, at + 2),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(journal.verify(&run).await.unwrap(), []);
}

/// Not a test: the process that `a_holder_that_is_killed…` kills, and one of the racers.
#[tokio::test(flavor = "multi_thread")]
async fn holder() {
    let Ok(url) = std::env::var("JOURNAL_HOLDER") else { return };
    let journal = open(&url).await;
    let taken = journal.acquire(&[name("a")], Duration::ZERO).await;
    match &taken {
        Ok(_) => println!("\nholder took it"),
        Err(JournalError::Held { .. }) => println!("\nholder found it held"),
        Err(error) => println!("\nholder failed: {error}"),
    }
    // Until it is killed.
    tokio::time::sleep(Duration::from_secs(60)).await;
}

/// Starts `holder` in processes of their own; answers what each said, and the processes.
fn start_holders(url: &str, count: usize) -> Vec<(String, std::process::Child)> {
    use std::io::BufRead;
    let start = || {
        std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "journal::leases::holder", "--nocapture"])
            .env("JOURNAL_HOLDER", url)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap()
    };
    let children: Vec<_> = (0..count).map(|_| start()).collect();
    let said = |mut child: std::process::Child| {
        let lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
        let line = lines.map_while(Result::ok).find_map(|line| line.strip_prefix("holder ").map(str::to_owned));
        (line.expect("a holder says what it found"), child)
    };
    children.into_iter().map(said).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_that_is_killed_loses_its_lease_within_a_second() {
    let Some(server) = shared(Version::V15) else { return };
    let database = server.database();
    let journal = open(&database.url()).await;
    for _ in 0..3 {
        let mut holders = start_holders(&database.url(), 1);
        let (said, child) = &mut holders[0];
        assert_eq!(said, "took it");
        let held = journal.acquire(&[name("a")], Duration::ZERO).await;
        match held {
            Err(JournalError::Held { holder, .. }) => {
                assert!(holder.contains(&format!("(pid {})", child.id())), "{holder}");
            }
            other => panic!("{other:?}"),
        }
        child.kill().unwrap();
        let began = Instant::now();
        journal.acquire(&[name("a")], Duration::from_secs(10)).await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
        child.wait().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_sixteen_processes_takes_a_lease() {
    let Some(server) = shared(Version::V15) else { return };
    let database = server.database();
    let mut holders = start_holders(&database.url(), 16);
    let took = holders.iter().filter(|(said, _)| said == "took it").count();
    let found = holders.iter().filter(|(said, _)| said == "found it held").count();
    let said: Vec<_> = holders.iter().map(|(said, _)| said.clone()).collect();
    for (_, child) in &mut holders {
        let _ = child.kill();
        let _ = child.wait();
    }
    assert_eq!((took, found), (1, 15), "{said:?}");
}
