//! Point 13: bounded.

use serde_json::json;
use upgrade_core::entry::{Cause, Entry};
use upgrade_core::error::StepError;
use upgrade_core::executor::Outcome;
use upgrade_core::pipeline::{Budget, Pipeline};
use upgrade_core::units::Span;

use crate::scripted::{Bench, Scripted, failing, nap};

fn taking(bench: &Bench, name: &str, millis: u64) -> Scripted {
    bench.step(name).applying(move |cx| async move {
        tokio::select! {
            () = nap(millis) => Ok(json!(null)),
            () = cx.cancelled().cancelled() => Err(StepError::permanent("cancelled")),
        }
    })
}

fn minute() -> Budget {
    Budget { run: Some(Span::from_secs(60)), rollback: None }
}

#[tokio::test(start_paused = true)]
async fn a_step_whose_time_does_not_fit_any_more_is_not_started() {
    let bench = Bench::default();
    let pipeline = Pipeline::builder("p")
        .step("a", taking(&bench, "a", 40_000))
        .step_with("b", bench.step("b"), |options| options.timeout(Span::from_secs(30)))
        .budget(minute())
        .build()
        .unwrap();
    let report = bench.run(&pipeline).await;
    let Outcome::RolledBack { cause: Some(Cause::Budget { message }), .. } = report.outcome else {
        panic!("{report:?}")
    };
    assert!(message.contains("`b`"), "{message}");
    assert_eq!(bench.count("prepare b"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_run_over_its_budget_is_cancelled_and_rolled_back() {
    let bench = Bench::default();
    let pipeline = Pipeline::builder("p").step("a", taking(&bench, "a", 300_000)).budget(minute()).build().unwrap();
    let begun = tokio::time::Instant::now();
    let report = bench.run(&pipeline).await;
    assert!(matches!(report.outcome, Outcome::RolledBack { .. }), "{report:?}");
    assert!(begun.elapsed().as_secs() < 65, "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_step_past_its_timeout_fails_the_run() {
    let bench = Bench::default();
    let pipeline = Pipeline::builder("p")
        .step_with("a", taking(&bench, "a", 300_000), |options| options.timeout(Span::from_secs(10)))
        .build()
        .unwrap();
    let begun = tokio::time::Instant::now();
    let report = bench.run(&pipeline).await;
    assert!(matches!(report.outcome, Outcome::RolledBack { cause: Some(Cause::Step { .. }), .. }), "{report:?}");
    assert!(begun.elapsed().as_secs() < 15, "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_rollback_past_its_budget_raises_the_alarm_and_goes_on() {
    let bench = Bench::default();
    let a = bench.step("a").rolling_back(|_| async {
        nap(120_000).await;
        Ok(())
    });
    let budget = Budget { run: None, rollback: Some(Span::from_secs(60)) };
    let pipeline = Pipeline::builder("p").step("a", a).verify("no", failing()).budget(budget).build().unwrap();
    let report = bench.run(&pipeline).await;
    assert!(matches!(report.outcome, Outcome::RolledBack { .. }), "{report:?}");
    let alarms = bench.entries().await.iter().filter(|entry| matches!(entry, Entry::BudgetAlarm { .. })).count();
    assert_eq!(alarms, 1);
}

#[tokio::test(start_paused = true)]
async fn a_rollback_is_not_bound_by_the_budget_of_the_run() {
    let bench = Bench::default();
    let a = bench.step("a").rolling_back(|cx| async move {
        nap(120_000).await;
        assert!(!cx.cancelled().is_cancelled());
        Ok(())
    });
    let pipeline = Pipeline::builder("p").step("a", a).verify("no", failing()).budget(minute()).build().unwrap();
    let report = bench.run(&pipeline).await;
    assert!(matches!(report.outcome, Outcome::RolledBack { .. }), "{report:?}");
}
