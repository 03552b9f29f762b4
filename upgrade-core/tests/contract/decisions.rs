//! What is decided next, from nothing but a pipeline and the entries of a journal.

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use upgrade_core::AnyStep;
use upgrade_core::context::Direction;
use upgrade_core::entry::{Definition, Demand, ENTRY_FORMAT, Entry, Header, Phase, Record, Request, Versioned};
use upgrade_core::error::StepError;
use upgrade_core::executor::decide::{Action, Call, Circumstances, Decision, decide, is_urgent};
use upgrade_core::executor::state::Run;
use upgrade_core::names::{Actor, CheckId, PipelineName, RunId};
use upgrade_core::pipeline::{Budget, CommitMode, Pipeline};
use upgrade_core::transition::RunState::{self, *};
use upgrade_core::units::Span;
use upgrade_core::verdict::Verdict;

use crate::scripted::{Bench, passing, step};

const NONE: [&str; 0] = [];

fn created() -> Entry {
    let definition = Definition {
        fingerprint: String::new(),
        base_fingerprint: String::new(),
        shape: json!({}),
        document: json!(null),
        base_dir: "/".into(),
        variables: [].into(),
    };
    Entry::RunCreated(Box::new(Header {
        format: ENTRY_FORMAT,
        run: RunId::generate(),
        pipeline: PipelineName::try_from("p").unwrap(),
        environment: None,
        from: None,
        to: None,
        locks: Vec::new(),
        definition,
        actor: Actor::current(),
        engine: "test".into(),
    }))
}

fn data() -> Versioned {
    Versioned { kind: "test.scripted".into(), format: 1, value: json!("found") }
}

fn enter(state: RunState) -> Entry {
    Entry::RunEntered { state, cause: None, deadline: None, health: None }
}

fn prepared(name: &str) -> Entry {
    Entry::StepPrepared { step: step(name), undo: data(), changes: Vec::new() }
}

fn applied(name: &str) -> Entry {
    Entry::StepApplied { step: step(name), output: data(), elapsed_ms: 1 }
}

fn undoing(name: &str) -> Entry {
    Entry::StepUndoing { step: step(name) }
}

fn undone(name: &str) -> Entry {
    Entry::StepUndone { step: step(name), elapsed_ms: 1 }
}

fn failed(name: &str, direction: Direction) -> Entry {
    let error = StepError::permanent("seeded");
    Entry::StepFailed { step: step(name), direction, attempt: 1, error, retry_at: None, elapsed_ms: 1 }
}

fn attached() -> Entry {
    Entry::DriverAttached { actor: Actor::current(), engine: "test".into(), epoch: 1 }
}

fn reported(phase: Phase, name: &str, verdict: Verdict) -> Entry {
    Entry::CheckReported { phase, check: CheckId::try_from(name).unwrap(), verdict, elapsed_ms: 1 }
}

fn demanded(demand: Demand) -> [Entry; 2] {
    let request = Request::new(demand);
    let id = request.id.clone();
    [Entry::RequestReceived { request }, Entry::RequestAnswered { id, refused: None }]
}

fn replay(entries: impl IntoIterator<Item = Entry>) -> Run {
    let records: Vec<Record> = std::iter::once(created())
        .chain(entries)
        .zip(0..)
        .map(|(entry, seq)| Record {
            seq,
            at: Timestamp::UNIX_EPOCH,
            prev: String::new(),
            entry,
            digest: String::new(),
        })
        .collect();
    Run::replay(&records).unwrap()
}

/// Writes a decision as a test reads it: `prepare b`, `enter held`, `end`.
fn told(decision: &Decision) -> Vec<String> {
    let told = |action: &Action| match action {
        Action::Call(Call::Check(phase, check)) => format!("{phase} {check}"),
        Action::Call(Call::Prepare(step)) => format!("prepare {step}"),
        Action::Call(Call::Apply(step)) => format!("apply {step}"),
        Action::Call(Call::Undo(step)) => format!("undo {step}"),
        Action::Call(Call::Commit(step)) => format!("commit {step}"),
        Action::BeginUndo(step) => format!("begin undo {step}"),
        Action::Enter { state, .. } => format!("enter {state}"),
    };
    let end = decision.end.then(|| "end".to_owned());
    decision.actions.iter().map(told).chain(end).collect()
}

fn decided(pipeline: &Pipeline, entries: Vec<Entry>, in_flight: &[Call], seconds: i64) -> Decision {
    let in_flight: BTreeSet<Call> = in_flight.iter().cloned().collect();
    let now = Timestamp::UNIX_EPOCH + SignedDuration::from_secs(seconds);
    decide(pipeline, &replay(entries), &Circumstances { in_flight: &in_flight, now, undo_estimate_ms: 0 })
}

/// `a` ← `b`, `a` ← `c`, and `d` on its own.
fn graph(bench: &Bench) -> Pipeline {
    Pipeline::builder("p")
        .step_with("a", bench.step("a"), |options| options.needs(NONE))
        .step_with("b", bench.step("b"), |options| options.needs(["a"]))
        .step_with("c", bench.step("c"), |options| options.needs(["a"]))
        .step_with("d", bench.step("d"), |options| options.needs(NONE))
        .max_parallel(2)
        .build()
        .unwrap()
}

#[test]
fn each_journal_has_its_next_decision() {
    let bench = Bench::default();
    let pipeline = graph(&bench);
    let back = |name: &str| failed(name, Direction::Back);
    let all = || ["a", "b", "c", "d"].into_iter().flat_map(|name| [prepared(name), applied(name)]);
    let applying = |more: Vec<Entry>| std::iter::once(enter(Applying)).chain(more).collect::<Vec<_>>();
    let then = |more: Vec<Entry>| applying(all().chain([enter(RollingBack)]).chain(more).collect());
    let table: Vec<(&str, Vec<Entry>, &[&str])> = vec![
        ("nothing to ask", vec![], &["enter applying"]),
        ("what needs nothing starts", applying(vec![]), &["prepare a", "prepare d"]),
        ("prepared is applied", applying(vec![prepared("a")]), &["apply a", "prepare d"]),
        ("no more than may run", applying(vec![prepared("a"), applied("a")]), &["prepare b", "prepare c"]),
        ("cut off is applied again", applying(vec![prepared("a"), attached()]), &["apply a", "prepare d"]),
        ("all is applied", applying(all().collect()), &["enter verifying"]),
        (
            "a failure turns back",
            applying(vec![prepared("a"), failed("a", Direction::Forward)]),
            &["enter rolling back"],
        ),
        ("the last is undone first", then(vec![]), &["begin undo d", "begin undo c"]),
        ("what is begun is called", then(vec![undoing("d"), undoing("c")]), &["undo d", "undo c"]),
        ("what others need waits", then(vec![undoing("d"), undone("d"), undoing("c")]), &["undo c", "begin undo b"]),
        (
            "then comes what they needed",
            then(["d", "c", "b"].into_iter().flat_map(|name| [undoing(name), undone(name)]).collect()),
            &["begin undo a"],
        ),
        (
            "all is back",
            then(["d", "c", "b", "a"].into_iter().flat_map(|name| [undoing(name), undone(name)]).collect()),
            &["enter rolled back"],
        ),
        ("a failed undo lets others go on", then(vec![undoing("c"), back("c")]), &["begin undo d", "begin undo b"]),
        (
            "nothing is left but the failed undo",
            then(vec![undoing("c"), back("c"), undoing("d"), undone("d"), undoing("b"), undone("b")]),
            &["enter stuck"],
        ),
        (
            "commits in order",
            applying(all().chain([enter(Verifying), enter(Committing)]).collect()),
            &["commit a", "commit d"],
        ),
        (
            "a stop holds",
            applying(
                [prepared("a"), applied("a")]
                    .into_iter()
                    .chain(demanded(Demand::Stop { reason: String::new() }))
                    .collect(),
            ),
            &["enter held"],
        ),
        ("held waits", applying(vec![enter(Held)]), &["end"]),
    ];
    for (name, entries, expected) in table {
        assert_eq!(told(&decided(&pipeline, entries, &[], 0)), expected, "{name}");
    }
}

#[test]
fn nothing_turns_while_a_call_is_under_way() {
    let bench = Bench::default();
    let pipeline = graph(&bench);
    let failing = vec![enter(Applying), prepared("a"), prepared("d"), failed("a", Direction::Forward)];
    assert!(told(&decided(&pipeline, failing.clone(), &[Call::Apply(step("d"))], 0)).is_empty());
    let turned: Vec<Entry> = failing.into_iter().chain([enter(RollingBack)]).collect();
    assert!(told(&decided(&pipeline, turned, &[Call::Apply(step("d"))], 0)).is_empty(), "undone beside an apply");
}

#[test]
fn only_an_operator_a_budget_or_a_guard_cancels_what_runs() {
    let rollback = demanded(Demand::Rollback { reason: String::new() });
    let begun = || vec![enter(Applying), prepared("a")];
    let urgent = |more: Vec<Entry>| is_urgent(&replay(begun().into_iter().chain(more)));
    assert!(urgent(rollback.to_vec()));
    assert!(!urgent(vec![failed("a", Direction::Forward)]));
    assert!(!urgent(demanded(Demand::Stop { reason: String::new() }).to_vec()));
    assert!(!urgent([enter(RollingBack)].into_iter().chain(rollback).collect()), "an undo is not cancelled");
}

#[test]
fn a_check_counts_only_as_pass_or_warning() {
    let pipeline = Pipeline::builder("p").check("c", passing()).step("a", Bench::default().step("a")).build().unwrap();
    for (verdict, expected) in [
        (Verdict::pass(""), "enter applying"),
        (Verdict::warn(""), "enter applying"),
        (Verdict::fail(""), "enter rejected"),
        (Verdict::unknown(""), "enter rejected"),
    ] {
        let entries = vec![reported(Phase::Pre, "c", verdict)];
        assert_eq!(told(&decided(&pipeline, entries, &[], 0)), [expected]);
    }
    assert_eq!(told(&decided(&pipeline, vec![], &[], 0)), ["pre-check c"]);
}

#[test]
fn the_pivot_waits_its_turn_and_turns_nothing_back() {
    let bench = Bench::default();
    let pivot = AnyStep::irreversible(bench.step("pivot"), "seeded");
    let pipeline = Pipeline::builder("p")
        .any_step("pivot", pivot, |options| options.needs(NONE))
        .step_with("a", bench.step("a"), |options| options.needs(NONE))
        .build()
        .unwrap();
    let done = || vec![enter(Applying), prepared("a"), applied("a")];
    assert_eq!(told(&decided(&pipeline, vec![enter(Applying)], &[], 0)), ["prepare a"]);
    assert_eq!(told(&decided(&pipeline, done(), &[], 0)), ["prepare pivot"]);
    let failed = done().into_iter().chain([prepared("pivot"), failed("pivot", Direction::Forward)]).collect();
    assert_eq!(told(&decided(&pipeline, failed, &[], 0)), ["enter held"]);
}

#[test]
fn probation_ends_with_its_deadline_as_its_mode_says() {
    let bench = Bench::default();
    let span = Span::from_secs(60);
    for (mode, after) in
        [(CommitMode::After(span), "enter committing"), (CommitMode::ConfirmWithin(span), "enter rolling back")]
    {
        let pipeline = Pipeline::builder("p").step("a", bench.step("a")).commit(mode).build().unwrap();
        let deadline = Some(Timestamp::UNIX_EPOCH + SignedDuration::from_secs(60));
        let probation = Entry::RunEntered { state: Probation, cause: None, deadline, health: None };
        let entries = || vec![enter(Applying), prepared("a"), applied("a"), enter(Verifying), probation.clone()];
        let early = decided(&pipeline, entries(), &[], 59);
        assert_eq!((told(&early), early.wake), (vec![], deadline));
        assert_eq!(told(&decided(&pipeline, entries(), &[], 60)), [after]);
        let confirmed = entries().into_iter().chain(demanded(Demand::Confirm { reason: String::new() })).collect();
        assert_eq!(told(&decided(&pipeline, confirmed, &[], 10)), ["enter committing"]);
    }
}

#[test]
fn a_budget_turns_the_run_back_when_it_is_used_up() {
    let bench = Bench::default();
    let budget = Budget { run: Some(Span::from_secs(60)), rollback: None };
    let pipeline = Pipeline::builder("p").step("a", bench.step("a")).budget(budget).build().unwrap();
    assert_eq!(told(&decided(&pipeline, vec![enter(Applying)], &[], 59)), ["prepare a"]);
    assert_eq!(told(&decided(&pipeline, vec![enter(Applying)], &[], 60)), ["enter rolling back"]);
}
