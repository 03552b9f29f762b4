//! Journals of every released format stay readable.
#![cfg(feature = "testkit")]
#![cfg(test)]

use std::path::Path;
use std::time::Duration;

use serde_json::json;
use upgrade_core::context::Direction;
use upgrade_core::entry::{Cause, Demand, Entry, GuardAction, Health, Phase, Request, Resolution, Versioned};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::journal::conformance::{created, entered};
use upgrade_core::journal::{FileJournal, Journal, chain};
use upgrade_core::names::{Actor, CheckId, LockName, RunId, StepId};
use upgrade_core::transition::RunState;
use upgrade_core::verdict::Verdict;

const RUN: &str = "01938f5e-0000-7000-8000-000000000001";
const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/journal-1.jsonl");

/// One entry of each type, as format 1 has them.
fn entries() -> Vec<Entry> {
    let run = RunId::try_from(RUN).unwrap();
    let step = StepId::try_from("schema").unwrap();
    let check = CheckId::try_from("disk").unwrap();
    let actor = Actor { user: "tester".into(), host: "here".into(), pid: 1 };
    let at = "2026-11-21T02:00:00.123456789Z".parse().unwrap();
    let versioned = |value| Versioned { kind: "host.file".into(), format: 2, value };
    let verdict =
        Verdict::warn("nearly full").with_measurement("free_share", 0.1).with_fact("path", "/srv").with_hint("…");
    let conflict = Conflict { subject: "x".into(), found: "a".into(), intended: "b".into(), present: "c".into() };
    let error = StepError::conflict(conflict).with_detail("line\n\u{1F980}").with_hint(
        "look at x: keep the change and resolve with --skip, or put back what was found and --retry; \
         `on_conflict: overwrite` on the step lets it win",
    );
    let Entry::RunCreated(header) = created(&run, "golden") else { panic!("a header") };
    let definition = Box::new(header.definition.clone());
    let request = Request {
        id: "01938f5e-0000-7000-8000-000000000002".into(),
        at,
        actor: actor.clone(),
        demand: Demand::Resolve { step: step.clone(), resolution: Resolution::Skip, reason: "by hand".into() },
    };
    vec![
        Entry::RunCreated(header),
        Entry::DriverAttached { actor: actor.clone(), engine: "0.1.0".into(), epoch: 1 },
        Entry::DefinitionAdopted { definition, difference: vec!["+ step".into()], actor: actor.clone() },
        Entry::TargetIdentified { target: LockName::new("path", "/srv").unwrap(), identity: "8:1:42".into() },
        Entry::CheckReported {
            phase: Phase::Before(step.clone()),
            check: check.clone(),
            verdict: verdict.clone(),
            elapsed_ms: 3,
        },
        entered(RunState::Applying),
        Entry::GuardChanged { guard: check, breached: true, action: GuardAction::Hold, verdict },
        Entry::StepPrepared {
            step: step.clone(),
            undo: versioned(json!({ "found": null, "share": 0.30000000000000004 })),
            changes: vec![],
        },
        Entry::StepUnchanged { step: step.clone(), output: versioned(json!([])), reason: "done already".into() },
        Entry::StepSkipped { step: step.clone(), reason: "not here".into() },
        Entry::StepCheckpoint { step: step.clone(), direction: Direction::Back, checkpoint: versioned(json!(17)) },
        Entry::StepFailed {
            step: step.clone(),
            direction: Direction::Forward,
            attempt: 2,
            error: error.clone(),
            retry_at: Some(at),
            elapsed_ms: 9,
        },
        Entry::StepApplied { step: step.clone(), output: versioned(json!("text")), elapsed_ms: 5 },
        Entry::RunEntered {
            state: RunState::RollingBack,
            cause: Some(Cause::Step { step: step.clone(), error }),
            deadline: Some(at),
            health: None,
        },
        Entry::StepUndoing { step: step.clone() },
        Entry::StepUndone { step: step.clone(), elapsed_ms: 1 },
        Entry::RequestReceived { request },
        Entry::RequestAnswered { id: "01938f5e-0000-7000-8000-000000000002".into(), refused: Some("too late".into()) },
        Entry::StepResolved { step: step.clone(), resolution: Resolution::Abandon, actor, reason: "gone".into() },
        Entry::StepCommitted { step },
        Entry::BudgetAlarm { message: "the rollback takes longer than 5m".into() },
        Entry::RunEntered {
            state: RunState::RolledBack,
            cause: None,
            deadline: None,
            health: Some(Health::RestoredButUnhealthy),
        },
    ]
}

#[tokio::test]
async fn format_1_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let journal = FileJournal::open(directory.path()).unwrap();
    let run = RunId::try_from(RUN).unwrap();
    std::fs::copy(GOLDEN, directory.path().join(format!("runs/{RUN}.jsonl"))).unwrap();
    let records = journal.load(&run).await.unwrap();
    assert_eq!(records.iter().map(|record| record.entry.clone()).collect::<Vec<_>>(), entries());
    assert_eq!(journal.verify(&run).await.unwrap(), []);
    let summary = journal.runs().await.unwrap().remove(0);
    assert_eq!((summary.damage, summary.state, summary.entries), (None, Some(RunState::RolledBack), 22));
    // What is read is what was written, to the last digit: the chain can be computed again.
    let mut prev = "";
    for (seq, record) in (0..).zip(&records) {
        assert_eq!(chain::verify(record, seq, prev), Ok(()));
        prev = &record.digest;
    }
}

/// Makes the golden file of the present format. Only for a new format: the files of those that
/// were released are never made again.
#[tokio::test]
#[ignore = "writes into the source tree"]
async fn write_the_golden_file() {
    assert!(!Path::new(GOLDEN).exists(), "{GOLDEN} was released");
    let directory = tempfile::tempdir().unwrap();
    let journal = FileJournal::open(directory.path()).unwrap();
    let run = RunId::try_from(RUN).unwrap();
    let lease = journal.acquire(&[], Duration::ZERO).await.unwrap();
    let mut entries = entries();
    let rest = entries.split_off(10);
    journal.append(&lease, &run, 0, &entries).await.unwrap();
    journal.append(&lease, &run, 10, &rest).await.unwrap();
    drop(lease);
    std::fs::copy(directory.path().join(format!("runs/{RUN}.jsonl")), GOLDEN).unwrap();
}
