//! Points 4, 7, 8, 11 and 13: what is taken up again is what was begun, and is judged as it was.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;
use upgrade_core::context::blocking;
use upgrade_core::entry::{Cause, Demand};
use upgrade_core::executor::{ExecutorError, Interrupt, Outcome, Report, RunOptions};
use upgrade_core::journal::JournalError;
use upgrade_core::names::LockName;
use upgrade_core::pipeline::{Budget, CommitMode, GuardOptions, Pipeline};
use upgrade_core::units::Span;
use upgrade_core::verdict::Verdict;

use crate::scripted::{Answers, Bench, Place, nap, passing, rollback, why};

async fn run_detached(bench: &Bench, pipeline: &Pipeline) {
    let options = RunOptions { detach: true, ..RunOptions::default() };
    let report = bench.executor().run(pipeline, &options, &Interrupt::new()).await.unwrap();
    assert!(matches!(report.outcome, Outcome::Probation { .. }), "{report:?}");
}

async fn adopt(bench: &Bench, pipeline: &Pipeline) -> Result<Report, ExecutorError> {
    let options = RunOptions { adopt: true, ..RunOptions::default() };
    bench.executor().resume(pipeline, &bench.last_run().await, &options, &Interrupt::new()).await
}

fn refusal(result: Result<Report, ExecutorError>) -> String {
    match result {
        Err(ExecutorError::Refused { message, hint: Some(_) }) => message,
        other => panic!("{other:?}"),
    }
}

/// Stops a run whose first step is begun.
async fn stopped(bench: &Bench, pipeline: &Pipeline) {
    let driver = bench.spawn(pipeline);
    nap(500).await;
    bench.demand(pipeline, Demand::Stop { reason: why() }).await;
    let outcome = driver.await.unwrap().unwrap().outcome;
    assert!(matches!(outcome, Outcome::Held { .. }), "{outcome:?}");
}

#[tokio::test]
async fn a_probation_that_outlasts_the_budget_is_not_rolled_back_when_it_is_taken_up() {
    let bench = Bench::default();
    let pipeline = Pipeline::builder("p")
        .step("a", bench.step("a"))
        .verify("well", passing())
        .budget(Budget { run: Some(Span::from_millis(1500)), rollback: None })
        .commit(CommitMode::ConfirmWithin(Span::from_secs(3600)))
        .build()
        .unwrap();
    run_detached(&bench, &pipeline).await;
    // The journal keeps the time of the wall.
    tokio::time::sleep(Duration::from_millis(1600)).await;
    let report = bench.take_up(&pipeline, Demand::Confirm { reason: why() }).await;
    assert_eq!(report.outcome, Outcome::Committed);
}

#[tokio::test]
async fn a_probation_that_nobody_watched_is_not_committed_before_the_guards_were_asked() {
    let bench = Bench::default();
    let broken = Arc::new(AtomicBool::new(false));
    let says = broken.clone();
    let guard = Answers::new(move |_| match says.load(Ordering::SeqCst) {
        true => Verdict::fail("errors"),
        false => Verdict::pass("well"),
    });
    let pipeline = Pipeline::builder("p")
        .step("a", bench.step("a"))
        .guard_with("errors", guard, GuardOptions::default().every(Span::from_millis(50)))
        .commit(CommitMode::After(Span::from_millis(500)))
        .build()
        .unwrap();
    run_detached(&bench, &pipeline).await;
    broken.store(true, Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(600)).await;
    let report = bench.resume(&pipeline).await.unwrap();
    let Outcome::RolledBack { cause: Some(Cause::Check { check, .. }), .. } = report.outcome else {
        panic!("{report:?}")
    };
    assert_eq!(check.as_str(), "errors");
}

#[tokio::test(start_paused = true)]
async fn a_target_that_the_run_has_not_locked_is_refused_even_where_it_is_adopted() {
    let bench = Bench::default();
    let on = |targets: &[&str]| {
        let slow = bench.step("a").applying(|_| async {
            nap(3_000).await;
            Ok(json!(null))
        });
        let b =
            targets.iter().fold(bench.step("b"), |b, name| b.on(Place(LockName::new("db", name).unwrap(), "the one")));
        Pipeline::builder("p").step("a", slow).step("b", b).build().unwrap()
    };
    stopped(&bench, &on(&["orders"])).await;
    for resumed in [bench.resume(&on(&["customers"])).await, adopt(&bench, &on(&["orders", "customers"])).await] {
        let message = refusal(resumed);
        assert!(message.contains("db:customers"), "{message}");
    }
    assert_eq!(bench.count("apply b"), 0);
    assert_eq!(bench.resume(&on(&["orders"])).await.unwrap().outcome, Outcome::Committed);
}

#[tokio::test(start_paused = true)]
async fn a_step_that_was_begun_is_not_adopted_as_another() {
    let bench = Bench::default();
    let a = |version: u32| {
        bench.step("a").defined(json!({ "version": version })).applying(|_| async {
            nap(3_000).await;
            Ok(json!(null))
        })
    };
    let two = |builder: upgrade_core::pipeline::Builder| builder.step("b", bench.step("b")).build().unwrap();
    stopped(&bench, &two(Pipeline::builder("p").step("a", a(1)))).await;
    for (other, how) in [
        (two(Pipeline::builder("p").step("a", a(2))), "configured otherwise"),
        (two(Pipeline::builder("p").irreversible("a", a(1), "seeded")), "whether it can be undone"),
    ] {
        let message = refusal(adopt(&bench, &other).await);
        assert!(message.contains("`a`") && message.contains(how), "{message}");
    }
    assert_eq!(bench.count("prepare b"), 0);
}

#[tokio::test]
async fn a_run_is_not_taken_up_beside_work_that_blocks_and_did_not_return() {
    let bench = Bench::default();
    let returned = Arc::new(AtomicBool::new(false));
    let (says, asks) = (returned.clone(), returned.clone());
    let a = bench
        .step("a")
        .applying(move |_| {
            let says = says.clone();
            blocking(move || {
                std::thread::sleep(Duration::from_secs(2));
                says.store(true, Ordering::SeqCst);
                Ok(json!(null))
            })
        })
        .rolling_back(move |_| {
            assert!(asks.load(Ordering::SeqCst), "it is undone beside its own apply");
            async { Ok(()) }
        });
    let impatient = Span::from_millis(50);
    let pipeline = Pipeline::builder("p")
        .step_with("a", a, |options| options.timeout(impatient).grace(impatient))
        .build()
        .unwrap();
    let report = bench.run(&pipeline).await;
    assert!(matches!(report.outcome, Outcome::Held { cause: Some(Cause::Unresponsive { .. }), .. }), "{report:?}");
    let (options, interrupt) = (RunOptions::default(), Interrupt::new());
    let refused = bench.executor().resume(&pipeline, &report.run, &options, &interrupt).await;
    assert!(matches!(refused, Err(ExecutorError::Journal(JournalError::Held { .. }))), "{refused:?}");
    tokio::time::sleep(Duration::from_millis(2200)).await;
    let report = bench.take_up(&pipeline, rollback()).await;
    assert!(matches!(report.outcome, Outcome::RolledBack { .. }), "{report:?}");
}
