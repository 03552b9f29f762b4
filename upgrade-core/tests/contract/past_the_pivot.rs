//! Point 10: past the pivot the run only goes forward, or waits.

use serde_json::json;
use upgrade_core::error::StepError;
use upgrade_core::executor::Outcome;
use upgrade_core::pipeline::{GuardOptions, Pipeline};
use upgrade_core::transition::RunState;
use upgrade_core::units::Span;
use upgrade_core::verdict::Verdict;

use crate::scripted::{Answers, Bench, nap};

#[tokio::test(start_paused = true)]
async fn a_guard_that_breaks_while_the_pivot_runs_holds_and_does_not_break_it_off() {
    let bench = Bench::default();
    let pivot = bench.step("pivot").applying(|cx| async move {
        tokio::select! {
            () = nap(3_000) => Ok(json!("whole")),
            () = cx.cancelled().cancelled() => Err(StepError::permanent("broken off")),
        }
    });
    let guard = Answers::new(|asked| if asked < 4 { Verdict::pass("well") } else { Verdict::fail("errors") });
    let pipeline = Pipeline::builder("p")
        .irreversible("pivot", pivot, "seeded")
        .step("after", bench.step("after"))
        .guard_with("errors", guard, GuardOptions::default().every(Span::from_millis(500)))
        .build()
        .unwrap();
    let report = bench.run(&pipeline).await;
    assert!(matches!(report.outcome, Outcome::Held { state: RunState::Applying, .. }), "{report:?}");
    let run = upgrade_core::executor::state::Run::replay(&bench.records().await).unwrap();
    let output = run.steps().values().find_map(|step| step.output());
    assert_eq!(output, Some(&json!("whole")));
    assert_eq!(bench.count("prepare after"), 0);
}
