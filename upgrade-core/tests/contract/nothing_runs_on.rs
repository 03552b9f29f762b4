//! Point 4: nothing runs on behind our back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use upgrade_core::entry::{Cause, Demand, Entry, GuardAction};
use upgrade_core::error::StepError;
use upgrade_core::executor::{Answer, Interrupt, Outcome, RunOptions};
use upgrade_core::pipeline::{GuardOptions, Pipeline};
use upgrade_core::transition::RunState;
use upgrade_core::units::Span;
use upgrade_core::verdict::Verdict;

use crate::scripted::{Answers, Bench, nap, rollback, step, why};

#[tokio::test(start_paused = true)]
async fn what_a_crash_left_running_is_ended_before_the_step_goes_on() {
    let bench = Bench::default();
    let pipeline = |a| Pipeline::builder("p").step("a", a).build().unwrap();
    let driver = bench.spawn(&pipeline(bench.step("a").applying(|_| std::future::pending())));
    nap(300).await;
    driver.abort();
    let _ = driver.await;
    let again = bench.step("a").applying(|cx| async move {
        assert!(cx.is_interrupted());
        Ok(json!(null))
    });
    assert_eq!(bench.resume(&pipeline(again)).await.unwrap().outcome, Outcome::Committed);
    assert_eq!(bench.calls(), ["prepare a", "apply a", "settle a", "apply a", "commit a"]);
}

#[tokio::test(start_paused = true)]
async fn past_its_time_a_call_is_signalled_and_its_return_awaited() {
    let bench = Bench::default();
    let returned = Arc::new(AtomicBool::new(false));
    let (says, asks) = (returned.clone(), returned.clone());
    let a = bench
        .step("a")
        .applying(move |cx| {
            let says = says.clone();
            async move {
                cx.cancelled().cancelled().await;
                nap(5_000).await;
                says.store(true, Ordering::SeqCst);
                Err(StepError::permanent("cancelled"))
            }
        })
        .rolling_back(move |_| {
            assert!(asks.load(Ordering::SeqCst), "it is undone beside its own apply");
            async { Ok(()) }
        });
    let pipeline =
        Pipeline::builder("p").step_with("a", a, |options| options.timeout(Span::from_secs(1))).build().unwrap();
    let report = bench.run(&pipeline).await;
    assert!(matches!(report.outcome, Outcome::RolledBack { .. }), "{report:?}");
    assert!(returned.load(Ordering::SeqCst));
}

#[tokio::test(start_paused = true)]
async fn an_apply_that_does_not_return_holds_the_run_and_nothing_is_undone_beside_it() {
    let bench = Bench::default();
    let a = bench.step("a").applying(|_| std::future::pending());
    let slow = bench.step("slow").applying(|_| async {
        nap(60_000).await;
        Ok(json!(null))
    });
    let none: [&str; 0] = [];
    let pipeline = Pipeline::builder("p")
        .step_with("a", a, |options| options.needs(none).timeout(Span::from_secs(1)).grace(Span::from_secs(2)))
        .step_with("slow", slow, |options| options.needs(none))
        .build()
        .unwrap();
    let driver = bench.spawn(&pipeline);
    nap(10_000).await;
    // Held, and a sibling still runs: a rollback asked for now must not begin beside it.
    let answer = bench.demand(&pipeline, rollback()).await;
    let Outcome::Held { cause: Some(Cause::Unresponsive { step: id, .. }), state } =
        driver.await.unwrap().unwrap().outcome
    else {
        panic!("it is not held")
    };
    assert_eq!((id, state), (step("a"), RunState::Applying));
    assert!(matches!(answer, Answer::Driven(report) if matches!(report.outcome, Outcome::RolledBack { .. })));
    let entries = bench.entries().await;
    let place = |wanted: &dyn Fn(&Entry) -> bool| entries.iter().position(wanted).unwrap();
    let applied = place(&|entry| matches!(entry, Entry::StepApplied { step, .. } if step.as_str() == "slow"));
    assert!(applied < place(&|entry| matches!(entry, Entry::StepUndoing { .. })));
    assert!(bench.place("settle a") < bench.place("rollback a"));
}

#[tokio::test(start_paused = true)]
async fn a_rollback_that_an_unresponsive_call_kept_from_beginning_is_made_up_for() {
    let bench = Bench::default();
    let first = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let deaf = bench.step("a").applying(move |_| {
        let first = first.swap(false, std::sync::atomic::Ordering::SeqCst);
        async move {
            if first {
                nap(3_600_000).await;
            }
            Ok(json!(null))
        }
    });
    let pipeline =
        Pipeline::builder("p").step_with("a", deaf, |options| options.grace(Span::from_secs(2))).build().unwrap();
    let interrupt = Interrupt::new();
    let (executor, options) = (bench.executor(), RunOptions::default());
    let (report, ()) = tokio::join!(executor.run(&pipeline, &options, &interrupt), async {
        nap(1_000).await;
        interrupt.cancel();
    });
    let outcome = report.unwrap().outcome;
    assert!(matches!(outcome, Outcome::Held { cause: Some(Cause::Unresponsive { .. }), .. }), "{outcome:?}");
    // Somebody asked for the way back: going on does not forget it.
    let outcome = bench.resume(&pipeline).await.unwrap().outcome;
    assert!(matches!(outcome, Outcome::RolledBack { cause: Some(Cause::Operator { .. }), .. }), "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn when_a_step_fails_its_siblings_finish_first_and_no_new_step_starts() {
    let bench = Bench::default();
    let fails = bench.step("fails").applying(|_| async { Err(StepError::permanent("seeded")) });
    let slow = bench.step("slow").applying(|cx| async move {
        nap(3_000).await;
        assert!(!cx.cancelled().is_cancelled(), "a sibling is awaited, not cancelled");
        Ok(json!("whole"))
    });
    let none: [&str; 0] = [];
    let pipeline = Pipeline::builder("p")
        .step_with("fails", fails, |options| options.needs(none))
        .step_with("slow", slow, |options| options.needs(none))
        .step_with("after", bench.step("after"), |options| options.needs(["slow"]))
        .build()
        .unwrap();
    let report = bench.run(&pipeline).await;
    assert!(matches!(report.outcome, Outcome::RolledBack { .. }), "{report:?}");
    let entries = bench.entries().await;
    let applied = entries.iter().position(|entry| matches!(entry, Entry::StepApplied { .. })).unwrap();
    let turned = entries.iter().position(|entry| matches!(entry, Entry::StepUndoing { .. })).unwrap();
    assert!(applied < turned);
    assert_eq!(bench.count("prepare after"), 0);
}

fn cancellable(bench: &Bench) -> crate::scripted::Scripted {
    bench.step("a").applying(|cx| async move {
        cx.cancelled().cancelled().await;
        Err(StepError::permanent("cancelled"))
    })
}

#[tokio::test(start_paused = true)]
async fn a_guard_that_breaks_cancels_what_runs() {
    let bench = Bench::default();
    let guard = Answers::new(|asked| if asked < 3 { Verdict::pass("well") } else { Verdict::fail("errors") });
    let options = GuardOptions::default().every(Span::from_millis(100)).action(GuardAction::Rollback);
    let pipeline =
        Pipeline::builder("p").step("a", cancellable(&bench)).guard_with("errors", guard, options).build().unwrap();
    let report = bench.run(&pipeline).await;
    let Outcome::RolledBack { cause: Some(Cause::Check { check, .. }), .. } = report.outcome else {
        panic!("{report:?}")
    };
    assert_eq!(check.as_str(), "errors");
    assert_eq!(bench.count("rollback a"), 1);
}

#[tokio::test(start_paused = true)]
async fn an_operators_rollback_cancels_what_runs() {
    let bench = Bench::default();
    let pipeline = Pipeline::builder("p").step("a", cancellable(&bench)).build().unwrap();
    let driver = bench.spawn(&pipeline);
    nap(1_000).await;
    assert_eq!(bench.demand(&pipeline, rollback()).await, Answer::Granted);
    let report = driver.await.unwrap().unwrap();
    assert!(matches!(report.outcome, Outcome::RolledBack { cause: Some(Cause::Operator { .. }), .. }), "{report:?}");
}

#[tokio::test(start_paused = true)]
async fn a_second_demand_to_roll_back_does_not_cancel_the_undo() {
    let bench = Bench::default();
    let a = bench.step("a").applying(|_| async { Err(StepError::permanent("seeded")) }).rolling_back(|cx| async move {
        tokio::select! {
            () = nap(5_000) => Ok(()),
            () = cx.cancelled().cancelled() => Err(StepError::permanent("the undo was cancelled")),
        }
    });
    let pipeline = Pipeline::builder("p").step("a", a).build().unwrap();
    let interrupt = Interrupt::new();
    let (executor, options) = (bench.executor(), RunOptions::default());
    let (report, ()) = tokio::join!(executor.run(&pipeline, &options, &interrupt), async {
        nap(1_000).await;
        interrupt.cancel();
    });
    let outcome = report.unwrap().outcome;
    assert!(matches!(outcome, Outcome::RolledBack { .. }), "{outcome:?}");
    assert!(
        !bench
            .entries()
            .await
            .iter()
            .any(|entry| matches!(entry, Entry::StepFailed { direction: upgrade_core::context::Direction::Back, .. }))
    );
}

#[tokio::test(start_paused = true)]
async fn a_stop_lets_the_running_steps_finish_and_holds() {
    let bench = Bench::default();
    let slow = bench.step("slow").applying(|_| async {
        nap(3_000).await;
        Ok(json!(null))
    });
    let pipeline = Pipeline::builder("p").step("slow", slow).step("next", bench.step("next")).build().unwrap();
    let driver = bench.spawn(&pipeline);
    nap(500).await;
    assert_eq!(bench.demand(&pipeline, Demand::Stop { reason: why() }).await, Answer::Granted);
    let report = driver.await.unwrap().unwrap();
    assert!(matches!(report.outcome, Outcome::Held { state: RunState::Applying, .. }), "{report:?}");
    assert_eq!(bench.calls(), ["prepare slow", "apply slow"]);
    assert_eq!(bench.resume(&pipeline).await.unwrap().outcome, Outcome::Committed);
    assert_eq!(bench.count("apply slow"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_stop_during_the_pivots_prepare_leaves_the_way_back_open() {
    let bench = Bench::default();
    let pivot = bench.step("pivot").preparing(|_| async {
        nap(3_000).await;
        Ok(crate::scripted::change())
    });
    let pipeline =
        Pipeline::builder("p").step("a", bench.step("a")).irreversible("pivot", pivot, "seeded").build().unwrap();
    let driver = bench.spawn(&pipeline);
    nap(500).await;
    assert_eq!(bench.demand(&pipeline, Demand::Stop { reason: why() }).await, Answer::Granted);
    assert!(matches!(driver.await.unwrap().unwrap().outcome, Outcome::Held { .. }));
    let report = bench.take_up(&pipeline, rollback()).await;
    assert!(matches!(report.outcome, Outcome::RolledBack { .. }), "{report:?}");
    assert_eq!(bench.count("apply pivot"), 0);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_ended_keeps_the_step_from_being_undone() {
    let bench = Bench::default();
    let a = bench
        .step("a")
        .applying(|_| async { Err(StepError::permanent("seeded")) })
        .settling(|_| async { Err(StepError::permanent("it still runs")) });
    let report = bench.run(&Pipeline::builder("p").step("a", a).build().unwrap()).await;
    assert!(matches!(report.outcome, Outcome::Stuck { .. }), "{report:?}");
    assert_eq!(bench.count("rollback a"), 0);
}
