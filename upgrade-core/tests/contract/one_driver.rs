//! Point 7: one driver.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use upgrade_core::entry::{Demand, Entry, Resolution};
use upgrade_core::error::StepError;
use upgrade_core::executor::{Answer, Executor, ExecutorError, Interrupt, Outcome, RunOptions};
use upgrade_core::journal::{FileJournal, Journal, JournalError};
use upgrade_core::pipeline::{CommitMode, Pipeline};
use upgrade_core::units::Span;

use crate::journal_failure::Full;
use crate::scripted::{Bench, Place, nap, resolve, rollback, tries, why};

fn slow(bench: &Bench, millis: u64) -> Pipeline {
    let a = bench.step("a").applying(move |cx| async move {
        tokio::select! {
            () = nap(millis) => Ok(json!(null)),
            () = cx.cancelled().cancelled() => Err(StepError::permanent("cancelled")),
        }
    });
    Pipeline::builder("p").step("a", a).step("b", bench.step("b")).build().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_driver_that_lost_its_lease_cancels_and_writes_nothing() {
    let bench = Bench::default();
    let driver = bench.spawn(&slow(&bench, 60_000));
    nap(1_000).await;
    let before = bench.records().await.len();
    bench.journal.revoke_leases();
    let lost = tokio::time::Instant::now();
    let halted = driver.await.unwrap();
    assert!(lost.elapsed().as_secs() < 5, "what runs was not cancelled");
    assert!(matches!(halted, Err(ExecutorError::Journal(JournalError::LeaseLost { .. }))), "{halted:?}");
    assert_eq!(bench.records().await.len(), before);
    assert_eq!(bench.calls(), ["prepare a", "apply a"]);
}

#[tokio::test(start_paused = true)]
async fn two_drivers_cannot_have_one_run() {
    let bench = Bench::default();
    let pipeline = slow(&bench, 60_000);
    let driver = bench.spawn(&pipeline);
    nap(1_000).await;
    let second = bench.resume(&pipeline).await;
    assert!(matches!(second, Err(ExecutorError::Journal(JournalError::Held { .. }))), "{second:?}");
    assert_eq!(driver.await.unwrap().unwrap().outcome, Outcome::Committed);
    assert_eq!(bench.count("apply a"), 1);
}

async fn answered(bench: &Bench, demand: &Demand) -> usize {
    let entries = bench.entries().await;
    let asked: Vec<String> = entries
        .iter()
        .filter_map(|entry| match entry {
            Entry::RequestReceived { request } if request.demand == *demand => Some(request.id.clone()),
            _ => None,
        })
        .collect();
    entries.iter().filter(|entry| matches!(entry, Entry::RequestAnswered { id, .. } if asked.contains(id))).count()
}

#[tokio::test(start_paused = true)]
async fn demands_on_a_living_driver_are_journaled_answered_and_withdrawn() {
    let stop = Demand::Stop { reason: why() };
    for demand in [stop, rollback()] {
        let bench = Bench::default();
        let pipeline = slow(&bench, 10_000);
        let driver = bench.spawn(&pipeline);
        nap(1_000).await;
        assert_eq!(bench.demand(&pipeline, demand.clone()).await, Answer::Granted, "{demand:?}");
        let outcome = driver.await.unwrap().unwrap().outcome;
        assert!(matches!(outcome, Outcome::Held { .. } | Outcome::RolledBack { .. }), "{outcome:?}");
        assert_eq!(answered(&bench, &demand).await, 1);
        assert!(bench.journal.requests(&bench.last_run().await).await.unwrap().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn a_confirmation_reaches_a_living_driver() {
    let bench = Bench::default();
    let builder = Pipeline::builder("p").step("a", bench.step("a"));
    let pipeline = builder.commit(CommitMode::ConfirmWithin(Span::from_secs(600))).build().unwrap();
    let driver = bench.spawn(&pipeline);
    nap(5_000).await;
    assert_eq!(bench.demand(&pipeline, Demand::Confirm { reason: why() }).await, Answer::Granted);
    assert_eq!(driver.await.unwrap().unwrap().outcome, Outcome::Committed);
}

#[tokio::test(start_paused = true)]
async fn a_resolution_reaches_a_living_driver() {
    let bench = Bench::default();
    let none: [&str; 0] = [];
    let failing = bench.step("fails").rolling_back(|_| async { Err(StepError::permanent("seeded")) });
    let slow = bench.step("slow").rolling_back(|_| async {
        nap(30_000).await;
        Ok(())
    });
    let pipeline = Pipeline::builder("p")
        .step_with("fails", failing, |options| options.needs(none).undo_retry(tries(1)))
        .step_with("slow", slow, |options| options.needs(none))
        .verify("no", crate::scripted::failing())
        .build()
        .unwrap();
    let driver = bench.spawn(&pipeline);
    nap(5_000).await;
    assert_eq!(bench.demand(&pipeline, resolve("fails", Resolution::Skip)).await, Answer::Granted);
    let outcome = driver.await.unwrap().unwrap().outcome;
    assert!(matches!(outcome, Outcome::RolledBack { .. }), "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn a_demand_that_the_state_forbids_is_refused_with_a_reason_and_journaled() {
    let bench = Bench::default();
    let pipeline = slow(&bench, 10_000);
    let driver = bench.spawn(&pipeline);
    nap(1_000).await;
    let confirm = Demand::Confirm { reason: why() };
    let answer = bench.demand(&pipeline, confirm.clone()).await;
    assert!(matches!(&answer, Answer::Refused { message } if message.contains("not in probation")), "{answer:?}");
    assert_eq!(driver.await.unwrap().unwrap().outcome, Outcome::Committed);
    assert_eq!(answered(&bench, &confirm).await, 1);
}

#[tokio::test(start_paused = true)]
async fn an_answered_request_is_not_taken_up_again_after_a_crash() {
    let bench = Bench::default();
    let pipeline = slow(&bench, 10_000);
    let driver = bench.spawn(&pipeline);
    nap(1_000).await;
    let stop = Demand::Stop { reason: why() };
    bench.demand(&pipeline, stop.clone()).await;
    driver.await.unwrap().unwrap();
    // A crash between the answer and its withdrawal leaves the request where it was.
    let run = bench.last_run().await;
    let request = bench.entries().await.into_iter().find_map(|entry| match entry {
        Entry::RequestReceived { request } if request.demand == stop => Some(request),
        _ => None,
    });
    bench.journal.post(&run, &request.unwrap()).await.unwrap();
    assert_eq!(bench.resume(&pipeline).await.unwrap().outcome, Outcome::Committed);
    assert_eq!(answered(&bench, &stop).await, 1);
}

async fn held(bench: &Bench, name: &str, target: Option<&str>) -> Pipeline {
    let a = bench.step("a").applying(|_| async {
        nap(3_000).await;
        Ok(json!(null))
    });
    let a = match target {
        Some(path) => a.on(Place::path(path)),
        None => a,
    };
    let pipeline = Pipeline::builder(name).step("a", a).step("b", bench.step("b")).build().unwrap();
    let driver = bench.spawn(&pipeline);
    nap(1_000).await;
    bench.demand(&pipeline, Demand::Stop { reason: why() }).await;
    driver.await.unwrap().unwrap();
    pipeline
}

fn on(bench: &Bench, name: &str, target: &str) -> Pipeline {
    Pipeline::builder(name).step("a", bench.step("a").on(Place::path(target))).build().unwrap()
}

fn is_refused<T: std::fmt::Debug>(result: &Result<T, ExecutorError>) -> bool {
    matches!(result, Err(ExecutorError::Refused { hint: Some(_), .. }))
}

#[tokio::test(start_paused = true)]
async fn an_open_run_blocks_its_name() {
    let bench = Bench::default();
    let pipeline = held(&bench, "p", None).await;
    let second = bench.try_run(&pipeline).await;
    assert!(is_refused(&second), "{second:?}");
    let other = Pipeline::builder("other").step("a", bench.step("a")).build().unwrap();
    assert_eq!(bench.run(&other).await.outcome, Outcome::Committed);
}

#[tokio::test(start_paused = true)]
async fn an_open_run_blocks_every_target_that_overlaps() {
    let bench = Bench::default();
    held(&bench, "p", Some("/srv/app/config")).await;
    for overlapping in ["/srv/app/config", "/srv/app/config/below/it", "/srv/app", "/srv/app/../app/config/"] {
        let refused = bench.try_run(&on(&bench, "other", overlapping)).await;
        assert!(is_refused(&refused), "{overlapping}: {refused:?}");
    }
    assert_eq!(bench.run(&on(&bench, "other", "/srv/app/configuration")).await.outcome, Outcome::Committed);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_runs_that_begin_at_once_on_overlapping_paths_one_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let inner: Arc<dyn Journal> = Arc::new(FileJournal::open(directory.path().join("state")).unwrap());
    // Slow to write: a run that is just being made is not to be seen yet by one that looks.
    let journal: Arc<dyn Journal> = Arc::new(Full::slow(inner, Duration::from_millis(30)));
    for round in 0..10 {
        let bench = Bench::default();
        let beside = Arc::new(Mutex::new((0_u32, 0_u32)));
        let pipeline = |name: String, target: &str| {
            let beside = beside.clone();
            let a = bench.step("a").on(Place::path(target)).applying(move |_| {
                let beside = beside.clone();
                async move {
                    let most = {
                        let mut beside = beside.lock().unwrap();
                        beside.0 += 1;
                        beside.0
                    };
                    nap(20).await;
                    let mut beside = beside.lock().unwrap();
                    beside.1 = beside.1.max(most);
                    beside.0 -= 1;
                    Ok(json!(null))
                }
            });
            Pipeline::builder(name).step("a", a).build().unwrap()
        };
        let run = |pipeline: Pipeline| {
            let journal = journal.clone();
            tokio::spawn(async move {
                let (options, interrupt) = (RunOptions::default(), Interrupt::new());
                Executor::new(journal).run(&pipeline, &options, &interrupt).await
            })
        };
        let above = run(pipeline(format!("above{round}"), "/srv/app"));
        let below = run(pipeline(format!("below{round}"), "/srv/app/config"));
        let (above, below) = (above.await.unwrap(), below.await.unwrap());
        assert!(above.is_ok() || below.is_ok());
        assert!(beside.lock().unwrap().1 <= 1, "round {round}: both changed one path at once");
    }
}

#[tokio::test(start_paused = true)]
async fn the_idempotency_key_survives_a_crash() {
    let bench = Bench::default();
    let keys: Arc<Mutex<Vec<(String, u32)>>> = Arc::default();
    let noting = |hangs: bool| {
        let keys = keys.clone();
        bench.step("a").applying(move |cx| {
            keys.lock().unwrap().push((cx.key(), cx.attempt()));
            async move { if hangs { std::future::pending().await } else { Ok(json!(null)) } }
        })
    };
    let pipeline = |a| Pipeline::builder("p").step("a", a).build().unwrap();
    let driver = bench.spawn(&pipeline(noting(true)));
    nap(300).await;
    driver.abort();
    let _ = driver.await;
    bench.resume(&pipeline(noting(false))).await.unwrap();
    let keys = keys.lock().unwrap();
    assert_eq!(keys[0].0, keys[1].0);
    assert!(keys[0].1 < keys[1].1);
}
