//! Points 9 and 16: a failed undo is a workable state, and undo records outlive binaries.

use async_trait::async_trait;
use serde_json::{Value, json};
use upgrade_core::context::Context;
use upgrade_core::entry::{Entry, Health, Resolution};
use upgrade_core::error::StepError;
use upgrade_core::executor::Outcome;
use upgrade_core::names::StepId;
use upgrade_core::pipeline::{CheckOptions, Pipeline};
use upgrade_core::step::{FormatError, Prepared, Rollback, Step};
use upgrade_core::verdict::Verdict;

use crate::scripted::{Answers, Bench, Scripted, failing, resolve, step, tries};

/// An undo that fails `times` times.
fn failing_undo(bench: &Bench, name: &str, times: u32) -> Scripted {
    bench.step(name).rolling_back(move |cx| async move {
        if cx.attempt() <= times { Err(StepError::permanent("seeded")) } else { Ok(()) }
    })
}

#[tokio::test(start_paused = true)]
async fn a_failed_undo_is_tried_again_with_growing_pauses() {
    let bench = Bench::default();
    let a = failing_undo(&bench, "a", 3);
    let builder = Pipeline::builder("p").step_with("a", a, |options| options.undo_retry(tries(5)));
    let report = bench.run(&builder.verify("no", failing()).build().unwrap()).await;
    assert!(matches!(report.outcome, Outcome::RolledBack { .. }), "{report:?}");
    let retries: Vec<_> = bench
        .entries()
        .await
        .into_iter()
        .filter_map(|entry| match entry {
            Entry::StepFailed { retry_at: Some(at), .. } => Some(at),
            _ => None,
        })
        .collect();
    assert_eq!(retries.len(), 3);
    assert!(retries[2].duration_since(retries[1]) > retries[1].duration_since(retries[0]), "{retries:?}");
}

/// `base` ← `stuck`, and `beside` on its own.
fn forest(bench: &Bench, times: u32) -> Pipeline {
    let none: [&str; 0] = [];
    Pipeline::builder("p")
        .step_with("base", bench.step("base"), |options| options.needs(none))
        .step_with("stuck", failing_undo(bench, "stuck", times), |options| options.needs(["base"]).undo_retry(tries(1)))
        .step_with("beside", bench.step("beside"), |options| options.needs(none))
        .verify("no", failing())
        .build()
        .unwrap()
}

async fn stuck(bench: &Bench, times: u32) -> Pipeline {
    let pipeline = forest(bench, times);
    let report = bench.run(&pipeline).await;
    let Outcome::Stuck { steps, .. } = &report.outcome else { panic!("{report:?}") };
    assert_eq!(steps.iter().map(|(id, _)| id.clone()).collect::<Vec<StepId>>(), [step("stuck")]);
    pipeline
}

#[tokio::test(start_paused = true)]
async fn independent_branches_are_undone_and_what_the_stuck_step_needs_waits() {
    let bench = Bench::default();
    stuck(&bench, 1).await;
    assert_eq!((bench.count("rollback beside"), bench.count("rollback base")), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn the_operator_retries_skips_or_abandons_and_each_is_journaled() {
    for resolution in [Resolution::Retry, Resolution::Skip, Resolution::Abandon] {
        let bench = Bench::default();
        let pipeline = stuck(&bench, 1).await;
        let report = bench.take_up(&pipeline, resolve("stuck", resolution)).await;
        let undone = bench.count("rollback base");
        match (resolution, report.outcome) {
            (Resolution::Retry, Outcome::RolledBack { .. }) => {
                assert_eq!((bench.count("rollback stuck"), undone), (2, 1));
            }
            (Resolution::Skip, Outcome::RolledBack { .. }) => {
                assert_eq!((bench.count("rollback stuck"), undone), (1, 1));
            }
            // What the abandoned step stands on is not taken from under it.
            (Resolution::Abandon, Outcome::Abandoned { steps }) => {
                assert_eq!((steps, undone), (vec![step("base"), step("stuck")], 0));
            }
            (resolution, outcome) => panic!("{resolution:?}: {outcome:?}"),
        }
        let entries = bench.entries().await;
        let journaled = entries.iter().any(|entry| {
            matches!(entry, Entry::StepResolved { step, resolution: kept, reason, .. }
                if step.as_str() == "stuck" && *kept == resolution && reason == "a test")
        });
        assert!(journaled, "{resolution:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_fails_is_stuck_again() {
    let bench = Bench::default();
    let pipeline = stuck(&bench, 9).await;
    let report = bench.take_up(&pipeline, resolve("stuck", Resolution::Retry)).await;
    assert!(matches!(report.outcome, Outcome::Stuck { .. }), "{report:?}");
}

#[tokio::test(start_paused = true)]
async fn restored_and_restored_but_unhealthy_are_different_outcomes() {
    for (well, expected) in [(true, Health::Restored), (false, Health::RestoredButUnhealthy)] {
        for named in [true, false] {
            let bench = Bench::default();
            let answer = move |asked| if asked == 1 || well { Verdict::pass("well") } else { Verdict::fail("broken") };
            let builder = Pipeline::builder("p").step("a", bench.step("a")).verify("no", failing());
            // By default the pre-checks that had passed are asked again.
            let builder = match named {
                true => builder.rollback_verify("well", Answers::new(move |_| answer(2)), CheckOptions::default()),
                false => builder.check("well", Answers::new(answer)),
            };
            let report = bench.run(&builder.build().unwrap()).await;
            let Outcome::RolledBack { health, .. } = report.outcome else { panic!("{report:?}") };
            assert_eq!(health, expected, "named: {named}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_pre_check_asked_again_after_a_rollback_is_given_a_moment() {
    let bench = Bench::default();
    // The service that the undo has started answers at the third question.
    let answer = |asked| if asked == 1 || asked > 3 { Verdict::pass("well") } else { Verdict::fail("refused") };
    let builder = Pipeline::builder("p").check("up", Answers::new(answer)).step("a", bench.step("a"));
    let report = bench.run(&builder.verify("no", failing()).build().unwrap()).await;
    assert!(matches!(report.outcome, Outcome::RolledBack { health: Health::Restored, .. }), "{report:?}");
}

/// Writes format 2, and has written format 1: a bare text.
struct Grown;

#[async_trait]
impl Step for Grown {
    const KIND: &'static str = "test.grown";
    const FORMAT: u32 = 2;
    type Undo = Value;
    type Output = Value;

    async fn prepare(&self, _: &Context) -> Result<Prepared<Value, Value>, StepError> {
        Ok(Prepared::change(json!({ "found": "x" }), []))
    }

    async fn apply(&self, _: &Context, _: &Value) -> Result<Value, StepError> {
        Ok(json!(null))
    }

    fn read_undo(format: u32, value: Value) -> Result<Value, FormatError> {
        match format {
            1 => Ok(json!({ "found": value })),
            2 => Ok(value),
            found => Err(FormatError::Unknown { found, known: 2 }),
        }
    }

    fn read_output(_: u32, value: Value) -> Result<Value, FormatError> {
        Ok(value)
    }
}

#[async_trait]
impl Rollback for Grown {
    async fn rollback(&self, _: &Context, undo: &Value, _: Option<&Value>) -> Result<(), StepError> {
        if undo["found"] == "x" { Ok(()) } else { Err(StepError::permanent(format!("it read {undo}"))) }
    }
}

/// Applies with one version of the program and rolls back with another.
macro_rules! written_by {
    ($name:ident, $format:literal, $undo:expr) => {
        struct $name;

        #[async_trait]
        impl Step for $name {
            const KIND: &'static str = "test.grown";
            const FORMAT: u32 = $format;
            type Undo = Value;
            type Output = Value;
            async fn prepare(&self, _: &Context) -> Result<Prepared<Value, Value>, StepError> {
                Ok(Prepared::change($undo, []))
            }
            async fn apply(&self, _: &Context, _: &Value) -> Result<Value, StepError> {
                std::future::pending().await
            }
        }

        #[async_trait]
        impl Rollback for $name {
            async fn rollback(&self, _: &Context, _: &Value, _: Option<&Value>) -> Result<(), StepError> {
                Ok(())
            }
        }
    };
}

written_by!(Older, 1, json!("x"));
written_by!(Newer, 3, json!({ "was": "x" }));

async fn rolled_back_by_another_version(older: impl Rollback) -> Outcome {
    let bench = Bench::default();
    let driver = bench.spawn(&Pipeline::builder("p").step("a", older).build().unwrap());
    crate::scripted::nap(300).await;
    driver.abort();
    let _ = driver.await;
    let pipeline = Pipeline::builder("p").step("a", Grown).build().unwrap();
    bench.take_up(&pipeline, crate::scripted::rollback()).await.outcome
}

#[tokio::test(start_paused = true)]
async fn an_undo_record_of_an_older_format_is_read() {
    let outcome = rolled_back_by_another_version(Older).await;
    assert!(matches!(outcome, Outcome::RolledBack { .. }), "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn an_undo_record_of_an_unknown_format_is_stuck_with_a_clear_message() {
    let outcome = rolled_back_by_another_version(Newer).await;
    let Outcome::Stuck { steps, .. } = outcome else { panic!("{outcome:?}") };
    let error = steps[0].1.as_ref().unwrap();
    assert!(error.message().contains("format 3"), "{error:?}");
    assert!(error.hint().unwrap().contains("--skip"), "{error:?}");
}
