//! The server stops in the middle of a run: the run halts, and is resumed to its end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use upgrade_core::entry::{Entry, Record};
use upgrade_core::executor::{Executor, ExecutorError, Interrupt, Outcome, RunOptions};
use upgrade_core::journal::{Journal, JournalError, Lease, chain, conformance};
use upgrade_core::names::{LockName, RunId, Seq};
use upgrade_core::pipeline::Pipeline;
use upgrade_core::testkit::AppendThrough;
use upgrade_core::testkit::toy::{SetText, TextIs, ToyWorld};
use upgrade_postgres::PostgresJournal;
use upgrade_testbed::postgres::{Server, Version, own};

use super::open;

/// Says when the server is stopped, as seen from one append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    Before,
    /// So many microseconds after it was sent.
    During(u64),
    After,
}

/// Stops the server at one append.
struct Stopping {
    inner: PostgresJournal,
    server: Arc<Server>,
    at: u64,
    moment: Moment,
    appends: AtomicU64,
}

#[async_trait]
impl AppendThrough for Stopping {
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
        if self.appends.fetch_add(1, Ordering::SeqCst) + 1 != self.at {
            return self.inner.append(lease, run, at, entries).await;
        }
        let server = self.server.clone();
        match self.moment {
            Moment::Before => {
                server.stop_immediate();
                self.inner.append(lease, run, at, entries).await
            }
            Moment::During(pause) => {
                let stopping = tokio::task::spawn_blocking(move || {
                    std::thread::sleep(Duration::from_micros(pause));
                    server.stop_immediate();
                });
                let appended = self.inner.append(lease, run, at, entries).await;
                stopping.await.unwrap();
                appended
            }
            Moment::After => {
                let appended = self.inner.append(lease, run, at, entries).await;
                server.stop_immediate();
                appended
            }
        }
    }
}

fn pipeline(world: &ToyWorld, fails: bool) -> Pipeline {
    let builder = Pipeline::builder("p")
        .check("a", TextIs::new(world, "a", "old"))
        .step("a", SetText::new(world, "a", "new"))
        .step("b", SetText::new(world, "b", "new"))
        .step("c", SetText::new(world, "c", "new"));
    // Never true: the run is rolled back.
    let builder = if fails { builder.verify("fails", TextIs::new(world, "a", "other")) } else { builder };
    builder.no_rollback_verify().build().unwrap()
}

/// Counts how often each step was applied and undone, and sees to it that the chain is whole.
fn check_records(records: &[Record], at: &str) {
    let (mut prev, mut counts) = ("", BTreeMap::<String, u32>::new());
    for (seq, record) in (0..).zip(records) {
        assert_eq!(chain::verify(record, seq, prev), Ok(()), "{at}: record {seq}");
        prev = &record.digest;
        match &record.entry {
            Entry::StepApplied { step, .. } => *counts.entry(format!("applied {step}")).or_default() += 1,
            Entry::StepUndone { step, .. } => *counts.entry(format!("undone {step}")).or_default() += 1,
            Entry::RunCreated(_) => *counts.entry("created".into()).or_default() += 1,
            _ => {}
        }
    }
    assert!(counts.len() >= 4 && counts.values().all(|count| *count == 1), "{at}: {counts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_server_is_stopped_at_any_append_halts_and_is_resumed() {
    let mut stops = 0;
    for (version, fails) in [(Version::V15, false), (Version::V18, true)] {
        // What the server has written outlives its processes, synced or not.
        let Some(server) = own(version, &[("fsync", "off"), ("full_page_writes", "off")]) else { return };
        let server = Arc::new(server);
        let moments = [Moment::Before, Moment::During(100), Moment::After, Moment::During(500), Moment::During(2000)];
        for at in 1_u64.. {
            let moment = moments[at as usize % moments.len()];
            let told = format!("PostgreSQL {version}, append {at}, {moment:?}, fails: {fails}");
            let database = server.database();
            let world = ToyWorld::new([("a", "old"), ("b", "old"), ("c", "old")]);
            let pipeline = pipeline(&world, fails);
            let inner = open(&database.url()).await;
            let journal = Stopping { inner, server: server.clone(), at, moment, appends: AtomicU64::new(0) };
            let executor = Executor::new(Arc::new(journal));
            let halted = executor.run(&pipeline, &RunOptions::default(), &Interrupt::new()).await;
            if !server.is_stopped() {
                assert!(halted.is_ok() && at > 8, "{told}: {halted:?}");
                break;
            }
            stops += 1;
            if let Err(error) = &halted {
                assert!(
                    matches!(error, ExecutorError::Journal(JournalError::Server { .. } | JournalError::Poisoned)),
                    "{told}: {error:?}"
                );
            }
            let seen = world.observe();
            tokio::time::sleep(Duration::from_millis(20)).await;
            assert_eq!(world.observe(), seen, "{told}: something was done after the journal had failed");
            server.start();
            let again = open(&database.url()).await;
            let executor = Executor::new(Arc::new(again.clone()));
            let report = match again.runs().await.unwrap().first() {
                None => executor.run(&pipeline, &RunOptions::default(), &Interrupt::new()).await,
                Some(run) => executor.resume(&pipeline, &run.run, &RunOptions::default(), &Interrupt::new()).await,
            };
            let report = report.unwrap_or_else(|error| panic!("{told}: {error:?}"));
            match report.outcome {
                Outcome::Committed if !fails => {}
                Outcome::RolledBack { .. } if fails => {}
                other => panic!("{told}: {other:?}"),
            }
            let text = if fails { "old" } else { "new" };
            for name in ["a", "b", "c"] {
                assert_eq!(world.get(name).as_deref(), Some(text), "{told}: {name}");
            }
            let runs = again.runs().await.unwrap();
            assert_eq!(runs.len(), 1, "{told}");
            check_records(&again.load(&runs[0].run).await.unwrap(), &told);
        }
    }
    println!("the server was stopped {stops} times");
    assert!(stops >= 20, "{stops}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_whose_server_was_restarted_is_refused_until_it_takes_a_new_lease() {
    let Some(server) = own(Version::V16, &[]) else { return };
    let database = server.database();
    let journal = open(&database.url()).await;
    let (run, name) = (RunId::generate(), [LockName::new("test", "restart").unwrap()]);
    let lease = journal.acquire(&name, Duration::ZERO).await.unwrap();
    journal.append(&lease, &run, 0, &[conformance::created(&run, "restart")]).await.unwrap();
    server.stop_immediate();
    let entries = [conformance::undoing("x")];
    let first = journal.append(&lease, &run, 1, &entries).await;
    match &first {
        Err(error @ JournalError::Server { .. }) => {
            assert!(error.hint().contains("bring the server back"), "{error:?}");
        }
        other => panic!("{other:?}"),
    }
    server.start();
    for _ in 0..2 {
        let again = journal.append(&lease, &run, 1, &entries).await;
        assert!(matches!(again, Err(JournalError::Poisoned | JournalError::LeaseLost { .. })), "{again:?}");
        assert!(lease.verify().await.is_err());
    }
    // The same handle serves on, and what the dead session held is free.
    let began = Instant::now();
    let new = journal.acquire(&name, Duration::from_secs(5)).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    let records = journal.load(&run).await.unwrap();
    journal.append(&new, &run, records.len() as Seq, &entries).await.unwrap();
    drop(lease);
    new.verify().await.unwrap();
}
