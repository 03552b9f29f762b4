//! Point 10: the pivot.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use upgrade_core::AnyStep;
use upgrade_core::entry::{Entry, Phase};
use upgrade_core::error::StepError;
use upgrade_core::executor::{Answer, Outcome};
use upgrade_core::pipeline::{Budget, GuardOptions, Pipeline};
use upgrade_core::step::{Change, Effect};
use upgrade_core::transition::RunState;
use upgrade_core::units::Span;
use upgrade_core::verdict::Verdict;

use crate::scripted::{Answers, Bench, changing, nap, passing, rollback, step};

const NONE: [&str; 0] = [];

#[tokio::test(start_paused = true)]
async fn the_plan_names_the_pivot_and_what_an_undo_would_lose() {
    let bench = Bench::default();
    let a = bench.step("a").preparing(|_| async {
        Ok(changing(Change::new(Effect::Modify, "orders").undo_loses("rows written after the upgrade")))
    });
    let pipeline =
        Pipeline::builder("p").step("a", a).irreversible("drop", bench.step("drop"), "it is gone").build().unwrap();
    let plan = bench.executor().plan(&pipeline).await.unwrap();
    assert_eq!(plan.pivot, Some(step("drop")));
    assert_eq!(plan.undo_loses, [(step("a"), "rows written after the upgrade".to_owned())]);
    assert_eq!(plan.steps[1].irreversible.as_deref(), Some("it is gone"));
}

#[tokio::test(start_paused = true)]
async fn the_pivot_runs_alone() {
    let bench = Bench::default();
    let busy = Arc::new(AtomicBool::new(false));
    let (sets, asks) = (busy.clone(), busy.clone());
    let pivot = bench.step("pivot").applying(move |_| {
        let sets = sets.clone();
        async move {
            sets.store(true, Ordering::SeqCst);
            nap(3_000).await;
            sets.store(false, Ordering::SeqCst);
            Ok(json!(null))
        }
    });
    let side = |name: &str| {
        let asks = asks.clone();
        bench.step(name).applying(move |_| {
            assert!(!asks.load(Ordering::SeqCst), "it runs beside the pivot");
            async {
                nap(1_000).await;
                Ok(json!(null))
            }
        })
    };
    let pipeline = Pipeline::builder("p")
        .any_step("pivot", AnyStep::irreversible(pivot, "seeded"), |options| options.needs(NONE))
        .step_with("one", side("one"), |options| options.needs(NONE))
        .step_with("two", side("two"), |options| options.needs(NONE))
        .build()
        .unwrap();
    assert_eq!(bench.run(&pipeline).await.outcome, Outcome::Committed);
    // What can still be undone comes first.
    assert!(bench.place("apply pivot") > bench.place("apply two"));
}

#[tokio::test(start_paused = true)]
async fn irreversible_steps_side_by_side_take_turns() {
    let bench = Bench::default();
    let irreversible = |name: &str| AnyStep::irreversible(bench.step(name), "seeded");
    let pipeline = Pipeline::builder("p")
        .any_step("one", irreversible("one"), |options| options.needs(NONE))
        .any_step("two", irreversible("two"), |options| options.needs(NONE))
        .step_with("after", bench.step("after"), |options| options.needs(["two"]))
        .build()
        .unwrap();
    let driven = tokio::time::timeout(std::time::Duration::from_secs(600), bench.run(&pipeline)).await;
    assert_eq!(driven.expect("they wait for each other").outcome, Outcome::Committed);
}

#[tokio::test(start_paused = true)]
async fn checks_and_guards_are_asked_again_just_before_the_pivot() {
    let bench = Bench::default();
    let check = passing();
    let pipeline = Pipeline::builder("p")
        .check("well", check.clone())
        .step("a", bench.step("a"))
        .irreversible("pivot", bench.step("pivot"), "seeded")
        .guard_with("errors", passing(), GuardOptions::default().every(Span::from_secs(3600)))
        .build()
        .unwrap();
    bench.run(&pipeline).await;
    assert_eq!(check.asked(), 2);
    let entries = bench.entries().await;
    let asked = |name: &str| {
        entries.iter().position(
            |entry| matches!(entry, Entry::CheckReported { phase: Phase::Pivot, check, .. } if check.as_str() == name),
        )
    };
    let begun =
        entries.iter().position(|entry| matches!(entry, Entry::StepPrepared { step, .. } if step.as_str() == "pivot"));
    assert!(asked("well") < begun && asked("guard.errors") < begun && asked("guard.errors").is_some(), "{entries:?}");
}

#[tokio::test(start_paused = true)]
async fn a_check_that_fails_before_the_pivot_rolls_back() {
    let bench = Bench::default();
    let check = Answers::new(|asked| if asked == 1 { Verdict::pass("well") } else { Verdict::fail("not any more") });
    let pipeline = Pipeline::builder("p")
        .check("well", check)
        .step("a", bench.step("a"))
        .irreversible("pivot", bench.step("pivot"), "seeded")
        .build()
        .unwrap();
    let report = bench.run(&pipeline).await;
    assert!(matches!(report.outcome, Outcome::RolledBack { .. }), "{report:?}");
    assert_eq!((bench.count("prepare pivot"), bench.count("rollback a")), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn past_the_pivot_a_failure_holds_and_a_rollback_is_refused() {
    let bench = Bench::default();
    let later = bench.step("later").applying(|cx| async move {
        if cx.attempt() == 1 { Err(StepError::permanent("seeded")) } else { Ok(json!(null)) }
    });
    let pipeline = Pipeline::builder("p")
        .step("a", bench.step("a"))
        .irreversible("pivot", bench.step("pivot"), "seeded")
        .step("later", later)
        .build()
        .unwrap();
    let report = bench.run(&pipeline).await;
    assert!(matches!(report.outcome, Outcome::Held { state: RunState::Applying, .. }), "{report:?}");
    let answer = bench.demand(&pipeline, rollback()).await;
    assert!(matches!(&answer, Answer::Refused { message } if message.contains("pivot")), "{answer:?}");
    assert_eq!(bench.resume(&pipeline).await.unwrap().outcome, Outcome::Committed);
    assert!(!bench.calls().iter().any(|call| call.starts_with("rollback")));
}

#[tokio::test(start_paused = true)]
async fn a_pivot_that_fails_is_tried_again_and_then_holds() {
    let bench = Bench::default();
    let pivot = bench.step("pivot").applying(|_| async { Err(StepError::transient("seeded")) });
    let pipeline = Pipeline::builder("p").irreversible("pivot", pivot, "seeded").build().unwrap();
    let report = bench.run(&pipeline).await;
    assert!(matches!(report.outcome, Outcome::Held { .. }), "{report:?}");
    assert_eq!(bench.count("apply pivot"), 3);
}

#[tokio::test(start_paused = true)]
async fn past_the_pivot_no_budget_turns_the_run_back() {
    let bench = Bench::default();
    let pivot = bench.step("pivot").applying(|_| async {
        nap(50_000).await;
        Ok(json!(null))
    });
    let budget = Budget { run: Some(Span::from_secs(60)), rollback: None };
    let pipeline = Pipeline::builder("p")
        .irreversible("pivot", pivot, "seeded")
        .step_with("later", bench.step("later"), |options| options.timeout(Span::from_secs(30)))
        .budget(budget)
        .build()
        .unwrap();
    assert_eq!(bench.run(&pipeline).await.outcome, Outcome::Committed);
}
