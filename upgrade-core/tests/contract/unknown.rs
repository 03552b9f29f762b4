//! Point 12: unknown is not success.

use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::entry::GuardAction;
use upgrade_core::error::{CheckError, StepError};
use upgrade_core::executor::Outcome;
use upgrade_core::pipeline::{CheckOptions, CommitMode, GuardOptions, Pipeline};
use upgrade_core::transition::RunState;
use upgrade_core::units::Span;
use upgrade_core::verdict::{Limit, Status, Verdict};

use crate::scripted::{Answers, Bench};

fn unknown() -> Answers {
    Answers::new(|_| Verdict::unknown("no answer"))
}

#[tokio::test(start_paused = true)]
async fn an_unknown_pre_check_rejects_the_run_and_nothing_is_touched() {
    let bench = Bench::default();
    let check = unknown();
    let pipeline = Pipeline::builder("p").check("c", check.clone()).step("a", bench.step("a")).build().unwrap();
    let report = bench.run(&pipeline).await;
    assert!(matches!(report.outcome, Outcome::Rejected { .. }), "{report:?}");
    assert_eq!((check.asked(), bench.calls().len()), (3, 0));
}

#[tokio::test(start_paused = true)]
async fn three_unknown_answers_in_a_row_hold_the_run() {
    for place in ["verify", "before", "after"] {
        let bench = Bench::default();
        let check = unknown();
        let options = CheckOptions::default();
        let builder = Pipeline::builder("p");
        let builder = match place {
            "verify" => builder.step("a", bench.step("a")).verify("c", check.clone()),
            "before" => builder.step_with("a", bench.step("a"), |step| step.before("c", check.clone(), options)),
            _ => builder.step_with("a", bench.step("a"), |step| step.after("c", check.clone(), options)),
        };
        let report = bench.run(&builder.build().unwrap()).await;
        assert!(matches!(report.outcome, Outcome::Held { .. }), "{place}: {report:?}");
        assert_eq!(check.asked(), 3, "{place}");
        assert_eq!(bench.count("commit a"), 0, "{place}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_after_two_unknown_ones_counts() {
    let bench = Bench::default();
    let check = Answers::new(|asked| if asked < 3 { Verdict::unknown("no answer") } else { Verdict::pass("well") });
    let pipeline = Pipeline::builder("p").step("a", bench.step("a")).verify("c", check).build().unwrap();
    assert_eq!(bench.run(&pipeline).await.outcome, Outcome::Committed);
}

#[tokio::test(start_paused = true)]
async fn a_guard_that_is_unknown_three_times_in_a_row_holds_whatever_its_action() {
    for action in [GuardAction::Rollback, GuardAction::Warn] {
        let bench = Bench::default();
        let options = GuardOptions::default().every(Span::from_secs(5)).action(action);
        let pipeline = Pipeline::builder("p")
            .step("a", bench.step("a"))
            .guard_with("g", unknown(), options)
            .commit(CommitMode::After(Span::from_secs(600)))
            .build()
            .unwrap();
        let report = bench.run(&pipeline).await;
        assert!(matches!(report.outcome, Outcome::Held { state: RunState::Probation, .. }), "{report:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_held_check_is_asked_again_on_resume() {
    let bench = Bench::default();
    let check = Answers::new(|asked| if asked <= 3 { Verdict::unknown("no answer") } else { Verdict::pass("well") });
    let pipeline = Pipeline::builder("p").step("a", bench.step("a")).verify("c", check).build().unwrap();
    assert!(matches!(bench.run(&pipeline).await.outcome, Outcome::Held { .. }));
    assert_eq!(bench.resume(&pipeline).await.unwrap().outcome, Outcome::Committed);
}

#[test]
fn what_is_no_number_is_unknown() {
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        assert_eq!(Verdict::pass("well").with_measurement("p95_ms", value).status, Status::Unknown);
    }
}

#[test]
fn a_limit_without_its_figure_or_its_baseline_is_unknown() {
    let limits = |limit| [("p95_ms".to_owned(), limit)].into();
    let most = Limit { max: Some(10.0), ..Limit::default() };
    assert_eq!(Verdict::pass("empty").held_to(&limits(most), &[].into()).status, Status::Unknown);
    let rise = Limit { max_rise: Some(1.0), ..Limit::default() };
    let measured = Verdict::pass("well").with_measurement("p95_ms", 1.0);
    assert_eq!(measured.held_to(&limits(rise), &[].into()).status, Status::Unknown);
}

/// Never answers, or answers with an error.
struct Silent(bool);

#[async_trait::async_trait]
impl Check for Silent {
    async fn check(&self, _: &Context) -> Result<Verdict, CheckError> {
        if self.0 { std::future::pending().await } else { Err(StepError::permanent("it broke")) }
    }
}

#[tokio::test(start_paused = true)]
async fn a_check_that_is_late_or_breaks_is_unknown() {
    for late in [true, false] {
        let bench = Bench::default();
        let options = CheckOptions::default().timeout(Span::from_secs(1));
        let builder = Pipeline::builder("p").step("a", bench.step("a"));
        let report = bench.run(&builder.verify_with("c", Silent(late), options).build().unwrap()).await;
        assert!(matches!(report.outcome, Outcome::Held { .. }), "late: {late}: {report:?}");
    }
}

/// Reads a text that changes with every call, and says what it has to compare it with.
#[derive(Clone, Default)]
struct Compares(std::sync::Arc<std::sync::Mutex<Vec<String>>>);

#[async_trait::async_trait]
impl Check for Compares {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let mut asked = self.0.lock().unwrap();
        let before = cx.baseline_fact("read").unwrap_or("nothing");
        let what = if cx.is_baseline() { "baseline" } else { "later" };
        let line = format!("{what} in {}, {before} before", cx.direction());
        asked.push(line);
        Ok(Verdict::pass("read").with_fact("read", format!("text {}", asked.len())))
    }

    fn needs_baseline(&self) -> bool {
        true
    }
}

#[tokio::test(start_paused = true)]
async fn a_check_has_what_it_read_before_the_run_to_compare_with() {
    let (bench, check) = (Bench::default(), Compares::default());
    let fails = bench.step("a").applying(|_| async { Err(StepError::permanent("it broke")) });
    let pipeline = Pipeline::builder("p").verify("c", check.clone()).step("a", bench.step("a")).build().unwrap();
    bench.run(&pipeline).await;
    let forward = ["baseline in forward, nothing before", "later in forward, text 1 before"];
    assert_eq!(*check.0.lock().unwrap(), forward);

    // Asked only after a rollback, it is measured before the run none the less.
    let (bench, check) = (Bench::default(), Compares::default());
    let pipeline = Pipeline::builder("p")
        .step("a", fails)
        .rollback_verify("c", check.clone(), CheckOptions::default())
        .build()
        .unwrap();
    bench.run(&pipeline).await;
    assert_eq!(*check.0.lock().unwrap(), [forward[0], "later in back, text 1 before"]);
}
