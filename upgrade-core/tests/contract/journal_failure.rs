//! Points 5 and 6: one path, and a journal that may fail.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use upgrade_core::entry::{Entry, Record};
use upgrade_core::executor::decide::{Circumstances, decide};
use upgrade_core::executor::state::Run;
use upgrade_core::executor::{Executor, ExecutorError, Interrupt, Outcome, RunOptions};
use upgrade_core::journal::{Journal, JournalError, Lease, MemoryJournal};
use upgrade_core::names::{RunId, Seq};
use upgrade_core::pipeline::Pipeline;
use upgrade_core::testkit::AppendThrough;
use upgrade_core::testkit::toy::{SetText, TextIs, ToyWorld};

use crate::scripted::{Bench, failing, nap};

/// Fails at one append, for good; or only takes its time.
pub(crate) struct Full {
    inner: Arc<dyn Journal>,
    at: u64,
    durable: bool,
    appends: AtomicU64,
    delay: Duration,
}

impl Full {
    fn new(inner: &MemoryJournal, at: u64, durable: bool) -> Self {
        Self { inner: Arc::new(inner.clone()), at, durable, appends: 0.into(), delay: Duration::ZERO }
    }

    pub(crate) fn slow(inner: Arc<dyn Journal>, delay: Duration) -> Self {
        Self { inner, at: u64::MAX, durable: false, appends: 0.into(), delay }
    }
}

#[async_trait]
impl AppendThrough for Full {
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
        tokio::time::sleep(self.delay).await;
        let count = self.appends.fetch_add(1, Ordering::SeqCst) + 1;
        if count < self.at {
            return self.inner.append(lease, run, at, entries).await;
        }
        if count == self.at && self.durable {
            self.inner.append(lease, run, at, entries).await?;
        }
        let source = std::io::Error::from(std::io::ErrorKind::StorageFull);
        Err(JournalError::Storage { action: "write", path: "journal".into(), source })
    }
}

fn pipeline(world: &ToyWorld, fails: bool) -> Pipeline {
    let builder = Pipeline::builder("p")
        .check("a", TextIs::new(world, "a", "old"))
        .step("a", SetText::new(world, "a", "new"))
        .step("b", SetText::new(world, "b", "new"));
    let builder = if fails { builder.verify("fails", failing()) } else { builder };
    builder.no_rollback_verify().build().unwrap()
}

#[tokio::test(start_paused = true)]
async fn the_run_halts_at_whatever_append_fails_and_can_be_resumed() {
    for (fails, durable) in [(false, false), (false, true), (true, false), (true, true)] {
        for at in 1.. {
            let world = ToyWorld::new([("a", "old"), ("b", "old")]);
            let pipeline = pipeline(&world, fails);
            let inner = MemoryJournal::new();
            let full = Full::new(&inner, at, durable);
            let executor = Executor::new(Arc::new(full));
            let halted = executor.run(&pipeline, &RunOptions::default(), &Interrupt::new()).await;
            if halted.is_ok() {
                assert!(at > 5, "the journal was full only {at} times");
                break;
            }
            assert!(matches!(halted, Err(ExecutorError::Journal(JournalError::Storage { .. }))), "{halted:?}");
            let seen = world.observe();
            nap(120_000).await;
            assert_eq!(world.observe(), seen, "append {at}: something was done after the journal had failed");
            let bench = Bench { journal: inner.clone(), ..Bench::default() };
            let report = match inner.runs().await.unwrap().is_empty() {
                true => bench.run(&pipeline).await,
                false => bench.resume(&pipeline).await.unwrap(),
            };
            let (expected, text) = if fails { ("rolled back", "old") } else { ("committed", "new") };
            match report.outcome {
                Outcome::Committed => assert_eq!(expected, "committed"),
                Outcome::RolledBack { .. } => assert_eq!(expected, "rolled back"),
                other => panic!("append {at}: {other:?}"),
            }
            assert_eq!(world.get("a").as_deref(), Some(text), "append {at}");
            assert_eq!(world.get("b").as_deref(), Some(text), "append {at}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_undone_on_a_guess_after_the_journal_failed() {
    let bench = Bench::default();
    let journal = Full::new(&bench.journal, 4, false);
    let pipeline = Pipeline::builder("p").step("a", bench.step("a")).build().unwrap();
    let halted = Executor::new(Arc::new(journal)).run(&pipeline, &RunOptions::default(), &Interrupt::new()).await;
    assert!(halted.is_err());
    nap(120_000).await;
    assert_eq!(bench.count("rollback a"), 0);
}

#[tokio::test(start_paused = true)]
async fn the_same_pipeline_and_journal_give_the_same_decision() {
    let world = ToyWorld::new([("a", "old"), ("b", "old")]);
    let (bench, pipeline) = (Bench::default(), pipeline(&world, true));
    bench.run(&pipeline).await;
    let records = bench.records().await;
    let (in_flight, now) = (BTreeSet::new(), Timestamp::now());
    let around = Circumstances { in_flight: &in_flight, now, undo_estimate_ms: 0 };
    for length in 1..=records.len() {
        let once = decide(&pipeline, &Run::replay(&records[..length]).unwrap(), &around);
        let again = decide(&pipeline, &Run::replay(&records[..length]).unwrap(), &around);
        assert_eq!(once, again);
        assert!(once.end || !once.actions.is_empty(), "entry {length}: a resume would wait for ever: {once:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_resumed_at_any_entry_makes_the_entries_of_one_that_was_not() {
    let world = ToyWorld::new([("a", "old"), ("b", "old")]);
    let whole = Bench::default();
    whole.run(&pipeline(&world, false)).await;
    let kinds = |entries: Vec<Entry>| -> Vec<String> {
        let kind = |entry: &Entry| serde_json::to_value(entry).unwrap()["type"].as_str().unwrap().to_owned();
        let of_drivers = ["driver_attached", "request_received", "request_answered", "check_reported"];
        entries.iter().map(kind).filter(|kind| !of_drivers.contains(&kind.as_str())).collect()
    };
    let expected = kinds(whole.entries().await);
    for at in 2..8 {
        let world = ToyWorld::new([("a", "old"), ("b", "old")]);
        let bench = Bench::default();
        let full = Full::new(&bench.journal, at, true);
        let pipeline = pipeline(&world, false);
        let halted = Executor::new(Arc::new(full)).run(&pipeline, &RunOptions::default(), &Interrupt::new()).await;
        assert!(halted.is_err());
        bench.resume(&pipeline).await.unwrap();
        assert_eq!(kinds(bench.entries().await), expected, "append {at}");
    }
}
