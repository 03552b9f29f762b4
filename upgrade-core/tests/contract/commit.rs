//! Point 11: commit is separate.

use upgrade_core::entry::{Cause, Demand, Entry, GuardAction};
use upgrade_core::error::StepError;
use upgrade_core::executor::{Answer, Interrupt, Outcome, RunOptions};
use upgrade_core::pipeline::{Builder, CommitMode, GuardOptions, Pipeline};
use upgrade_core::transition::RunState;
use upgrade_core::units::Span;
use upgrade_core::verdict::Verdict;

use crate::scripted::{Answers, Bench, nap, rollback, tries, why};

const SPAN: Span = Span::from_secs(600);

fn two(bench: &Bench, mode: CommitMode) -> Builder {
    Pipeline::builder("p").step("a", bench.step("a")).step("b", bench.step("b")).commit(mode)
}

#[tokio::test(start_paused = true)]
async fn commits_come_after_the_entry_of_no_return_in_order_of_dependency() {
    let bench = Bench::default();
    assert_eq!(bench.run(&two(&bench, CommitMode::Now).build().unwrap()).await.outcome, Outcome::Committed);
    assert_eq!(bench.calls()[4..], ["commit a", "commit b"]);
    let entries = bench.entries().await;
    let place = |wanted: &dyn Fn(&Entry) -> bool| entries.iter().position(wanted).unwrap();
    let entered = place(&|entry| matches!(entry, Entry::RunEntered { state: RunState::Committing, .. }));
    assert!(entered < place(&|entry| matches!(entry, Entry::StepCommitted { .. })));
}

#[tokio::test(start_paused = true)]
async fn what_undo_needs_is_kept_until_the_probation_is_over() {
    let bench = Bench::default();
    let driver = bench.spawn(&two(&bench, CommitMode::After(SPAN)).build().unwrap());
    nap(599_000).await;
    assert!(!driver.is_finished());
    assert_eq!(bench.count("commit a"), 0);
    nap(2_000).await;
    assert_eq!(driver.await.unwrap().unwrap().outcome, Outcome::Committed);
}

#[tokio::test(start_paused = true)]
async fn a_guard_that_breaks_during_probation_rolls_back() {
    let bench = Bench::default();
    let guard = Answers::new(|asked| if asked < 30 { Verdict::pass("well") } else { Verdict::fail("errors") });
    let options = GuardOptions::default().every(Span::from_secs(10)).breach_for(Span::from_secs(30));
    let pipeline = two(&bench, CommitMode::After(SPAN)).guard_with("errors", guard, options).build().unwrap();
    let report = bench.run(&pipeline).await;
    assert!(matches!(report.outcome, Outcome::RolledBack { .. }), "{report:?}");
    assert_eq!((bench.count("commit a"), bench.count("rollback a")), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn a_breach_shorter_than_it_may_be_is_borne() {
    let bench = Bench::default();
    let guard = Answers::new(|asked| if asked == 5 { Verdict::fail("errors") } else { Verdict::pass("well") });
    let options = GuardOptions::default().every(Span::from_secs(10)).breach_for(Span::from_secs(30));
    let pipeline = two(&bench, CommitMode::After(SPAN)).guard_with("errors", guard, options).build().unwrap();
    assert_eq!(bench.run(&pipeline).await.outcome, Outcome::Committed);
}

#[tokio::test(start_paused = true)]
async fn a_guard_that_only_warns_or_holds_does_so() {
    for (action, held) in [(GuardAction::Warn, false), (GuardAction::Hold, true)] {
        let bench = Bench::default();
        let options = GuardOptions::default().every(Span::from_secs(10)).action(action);
        let guard = Answers::new(|asked| if asked < 5 { Verdict::pass("well") } else { Verdict::fail("errors") });
        let pipeline = two(&bench, CommitMode::After(SPAN)).guard_with("errors", guard, options).build().unwrap();
        let outcome = bench.run(&pipeline).await.outcome;
        assert_eq!(matches!(outcome, Outcome::Held { .. }), held, "{outcome:?}");
        assert_eq!(outcome == Outcome::Committed, !held, "{outcome:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn without_a_confirmation_in_time_the_run_rolls_back() {
    let bench = Bench::default();
    let report = bench.run(&two(&bench, CommitMode::ConfirmWithin(SPAN)).build().unwrap()).await;
    let Outcome::RolledBack { cause, .. } = report.outcome else { panic!("{report:?}") };
    assert!(matches!(cause, Some(Cause::NotConfirmed { .. })), "{cause:?}");
}

async fn detached(bench: &Bench, mode: CommitMode) -> Pipeline {
    let pipeline = two(bench, mode).build().unwrap();
    let options = RunOptions { detach: true, ..RunOptions::default() };
    let report = bench.executor().run(&pipeline, &options, &Interrupt::new()).await.unwrap();
    assert!(matches!(report.outcome, Outcome::Probation { deadline: Some(_) }), "{report:?}");
    pipeline
}

#[tokio::test(start_paused = true)]
async fn a_detached_run_is_in_probation_and_a_confirmation_commits_it() {
    let bench = Bench::default();
    let pipeline = detached(&bench, CommitMode::ConfirmWithin(SPAN)).await;
    let report = bench.take_up(&pipeline, Demand::Confirm { reason: why() }).await;
    assert_eq!(report.outcome, Outcome::Committed);
}

#[tokio::test(start_paused = true)]
async fn a_finished_run_can_be_rolled_back_until_it_is_committed() {
    let bench = Bench::default();
    let pipeline = detached(&bench, CommitMode::After(SPAN)).await;
    let report = bench.take_up(&pipeline, rollback()).await;
    assert!(matches!(report.outcome, Outcome::RolledBack { .. }), "{report:?}");
    let answer = bench.demand(&pipeline, rollback()).await;
    assert!(matches!(answer, Answer::Refused { .. }), "{answer:?}");
}

#[tokio::test(start_paused = true)]
async fn a_probation_that_is_taken_up_again_ends_when_it_would_have_ended() {
    let bench = Bench::default();
    let pipeline = detached(&bench, CommitMode::After(SPAN)).await;
    let deadline = |entries: Vec<Entry>| -> Vec<_> {
        entries
            .into_iter()
            .filter_map(|entry| match entry {
                Entry::RunEntered { state: RunState::Probation, deadline, .. } => deadline,
                _ => None,
            })
            .collect()
    };
    assert_eq!(bench.resume(&pipeline).await.unwrap().outcome, Outcome::Committed);
    let deadlines = deadline(bench.entries().await);
    assert_eq!(deadlines.len(), 2);
    assert_eq!(deadlines[0], deadlines[1]);
}

#[tokio::test(start_paused = true)]
async fn a_commit_that_a_crash_cut_off_is_finished_and_never_rolled_back() {
    let bench = Bench::default();
    let pipeline = |b| Pipeline::builder("p").step("a", bench.step("a")).step("b", b).build().unwrap();
    let driver = bench.spawn(&pipeline(bench.step("b").committing(|_| std::future::pending())));
    nap(1_000).await;
    driver.abort();
    let _ = driver.await;
    let pipeline = pipeline(bench.step("b"));
    let answer = bench.demand(&pipeline, rollback()).await;
    assert!(matches!(&answer, Answer::Refused { message } if message.contains("past its commit")), "{answer:?}");
    assert_eq!(bench.resume(&pipeline).await.unwrap().outcome, Outcome::Committed);
    assert_eq!((bench.count("commit a"), bench.count("commit b")), (1, 2));
}

#[tokio::test(start_paused = true)]
async fn a_commit_that_fails_is_tried_again_and_then_holds() {
    let bench = Bench::default();
    let a = bench
        .step("a")
        .committing(|cx| async move { if cx.attempt() <= 3 { Err(StepError::permanent("seeded")) } else { Ok(()) } });
    let pipeline = Pipeline::builder("p").step_with("a", a, |options| options.undo_retry(tries(2))).build().unwrap();
    let report = bench.run(&pipeline).await;
    assert!(matches!(report.outcome, Outcome::Held { state: RunState::Committing, .. }), "{report:?}");
    assert_eq!(bench.count("commit a"), 2);
}
