//! Points 1 to 3: undo first, compare before swap, attempted means undone.

use std::sync::Arc;

use serde_json::json;
use upgrade_core::context::OnConflict;
use upgrade_core::entry::Entry;
use upgrade_core::error::StepError;
use upgrade_core::executor::plan::PlannedEffect;
use upgrade_core::executor::{Executor, Outcome};
use upgrade_core::journal::{Journal, MemoryJournal};
use upgrade_core::pipeline::{Pipeline, Retry};
use upgrade_core::step::Prepared;
use upgrade_core::testkit::toy::{SetText, ToyWorld};

use crate::scripted::{Bench, change, failing, nap, step};

#[tokio::test(start_paused = true)]
async fn the_undo_record_is_durable_before_the_first_effect() {
    let bench = Bench::default();
    let journal = bench.journal.clone();
    let a = bench.step("a").applying(move |cx| {
        let journal = journal.clone();
        async move {
            let records = journal.load(cx.run()).await.unwrap();
            let prepared = |entry: &Entry| matches!(entry, Entry::StepPrepared { step, undo, .. } if step.as_str() == "a" && undo.value == "found");
            assert!(records.iter().any(|record| prepared(&record.entry)), "the undo record is not in the journal");
            Ok(json!(null))
        }
    });
    let report = bench.run(&Pipeline::builder("p").step("a", a).build().unwrap()).await;
    assert_eq!(report.outcome, Outcome::Committed);
}

#[tokio::test(start_paused = true)]
async fn prepare_runs_when_all_that_the_step_needs_is_applied() {
    let bench = Bench::default();
    let pipeline = Pipeline::builder("p").step("a", bench.step("a")).step("b", bench.step("b")).build().unwrap();
    bench.run(&pipeline).await;
    assert_eq!(bench.calls()[..4], ["prepare a", "apply a", "prepare b", "apply b"]);
}

#[tokio::test(start_paused = true)]
async fn a_record_that_never_became_durable_does_not_count() {
    let bench = Bench::default();
    let interrupted = bench.step("a").preparing(|_| std::future::pending());
    let pipeline = |a| Pipeline::builder("p").step("a", a).build().unwrap();
    let driver = bench.spawn(&pipeline(interrupted));
    nap(300).await;
    driver.abort();
    let _ = driver.await;
    bench.resume(&pipeline(bench.step("a"))).await.unwrap();
    assert_eq!(bench.calls(), ["prepare a", "prepare a", "apply a", "commit a"]);
}

#[tokio::test(start_paused = true)]
async fn a_plan_says_known_after_and_fails_not_because_a_step_has_not_run() {
    let bench = Bench::default();
    let b = bench.step("b").preparing(|cx| async move {
        assert!(cx.is_dry_run());
        Ok(Prepared::KnownAfter { step: step("a") })
    });
    let c = bench.step("c").preparing(|_| async { Err(StepError::permanent("there is nothing to read yet")) });
    let pipeline = Pipeline::builder("p").step("a", bench.step("a")).step("b", b).step("c", c).build().unwrap();
    let plan = bench.executor().plan(&pipeline).await.unwrap();
    assert!(!plan.is_hopeless(), "{plan:?}");
    assert!(matches!(&plan.steps[1].effect, PlannedEffect::KnownAfter { step } if step.as_str() == "a"));
    assert!(matches!(&plan.steps[2].effect, PlannedEffect::Failed { after: Some(_), .. }));
    assert!(bench.calls().iter().all(|call| call.starts_with("prepare")), "{:?}", bench.calls());
    assert!(bench.journal.runs().await.unwrap().is_empty());
}

fn foreign(world: &ToyWorld, on_conflict: OnConflict) -> Pipeline {
    // Somebody else writes while the second step runs; then the run turns back.
    let world_of_others = world.clone();
    let calls = Arc::default();
    let others = crate::scripted::Scripted::new("others", &calls).applying(move |_| {
        world_of_others.put("text", Some("somebody else's"));
        async { Ok(json!(null)) }
    });
    Pipeline::builder("p")
        .step_with("text", SetText::new(world, "text", "new"), |options| options.on_conflict(on_conflict))
        .step("others", others)
        .verify("fails", failing())
        .build()
        .unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_third_state_is_stuck_with_all_three_states_and_left_alone() {
    let world = ToyWorld::new([("text", "old")]);
    let bench = Bench::default();
    let report = bench.run(&foreign(&world, OnConflict::Stop)).await;
    let Outcome::Stuck { steps, .. } = report.outcome else { panic!("{report:?}") };
    let conflict = steps[0].1.as_ref().unwrap().as_conflict().unwrap();
    assert_eq!([&conflict.found, &conflict.intended, &conflict.present], ["old", "new", "somebody else's"]);
    assert_eq!(world.get("text").as_deref(), Some("somebody else's"));
}

#[tokio::test(start_paused = true)]
async fn a_third_state_is_written_over_where_the_pipeline_says_so() {
    let world = ToyWorld::new([("text", "old")]);
    let report = Bench::default().run(&foreign(&world, OnConflict::Overwrite)).await;
    assert!(matches!(report.outcome, Outcome::RolledBack { .. }), "{report:?}");
    assert_eq!(world.get("text").as_deref(), Some("old"));
}

#[tokio::test(start_paused = true)]
async fn a_third_state_met_before_apply_is_left_alone() {
    let world = ToyWorld::new([("text", "old")]);
    let others = world.clone();
    let journal = MemoryJournal::new();
    // An observer sees the record when it is durable: the change falls between prepare and apply.
    struct Others(ToyWorld, std::sync::mpsc::Sender<()>);
    impl upgrade_core::executor::Observer for Others {
        fn entry(&mut self, _: &upgrade_core::names::RunId, record: &upgrade_core::entry::Record) {
            if matches!(record.entry, Entry::StepPrepared { .. }) {
                self.0.put("text", Some("somebody else's"));
                let _ = self.1.send(());
            }
        }
    }
    let (seen, sees) = std::sync::mpsc::channel();
    let waits = std::sync::Mutex::new(sees);
    let first = crate::scripted::Scripted::new("first", &Arc::default()).applying(move |_| {
        let _ = waits.lock().unwrap().recv_timeout(std::time::Duration::from_secs(5));
        async { Err(StepError::permanent("so that the text, prepared beside, is undone")) }
    });
    let pipeline = Pipeline::builder("p")
        .step_with("text", SetText::new(&world, "text", "new"), |options| options.needs([] as [&str; 0]))
        .step_with("first", first, |options| options.needs([] as [&str; 0]))
        .build()
        .unwrap();
    let executor = Executor::new(Arc::new(journal)).observer(Others(others, seen));
    let report = executor.run(&pipeline, &Default::default(), &Default::default()).await.unwrap();
    assert!(matches!(report.outcome, Outcome::Stuck { .. } | Outcome::RolledBack { .. }), "{report:?}");
    assert_eq!(world.get("text").as_deref(), Some("somebody else's"));
}

#[tokio::test(start_paused = true)]
async fn a_step_that_failed_timed_out_or_panicked_is_undone() {
    for how in ["fails", "hangs until it is cancelled", "panics"] {
        let bench = Bench::default();
        let a = bench.step("a").applying(move |cx| async move {
            match how {
                "fails" => Err(StepError::permanent("seeded")),
                "panics" => std::panic::resume_unwind(Box::new("seeded")),
                _ => {
                    cx.cancelled().cancelled().await;
                    Err(StepError::permanent("cancelled"))
                }
            }
        });
        let report = bench.run(&Pipeline::builder("p").step("a", a).build().unwrap()).await;
        assert!(matches!(report.outcome, Outcome::RolledBack { .. }), "{how}: {report:?}");
        assert_eq!(bench.count("rollback a"), 1, "{how}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_step_that_a_crash_cut_off_is_undone() {
    let bench = Bench::default();
    let hanging = bench.step("a").applying(|_| std::future::pending());
    let driver = bench.spawn(&Pipeline::builder("p").step("a", hanging).build().unwrap());
    nap(300).await;
    driver.abort();
    let _ = driver.await;
    let pipeline = Pipeline::builder("p").step("a", bench.step("a")).build().unwrap();
    let report = bench.take_up(&pipeline, crate::scripted::rollback()).await;
    assert!(matches!(report.outcome, Outcome::RolledBack { .. }), "{report:?}");
    assert_eq!(bench.calls(), ["prepare a", "apply a", "settle a", "rollback a"]);
}

#[tokio::test(start_paused = true)]
async fn an_unchanged_step_is_neither_applied_nor_undone_nor_committed() {
    for fails in [true, false] {
        let bench = Bench::default();
        let a = bench.step("a").preparing(|_| async { Ok(Prepared::unchanged(json!(null), "done already")) });
        let b = bench.step("b").preparing(|_| async { Ok(change()) });
        let builder = Pipeline::builder("p").step("a", a).step("b", b);
        let builder = if fails { builder.verify("fails", failing()) } else { builder };
        bench.run(&builder.build().unwrap()).await;
        assert!(bench.calls().iter().all(|call| call == "prepare a" || call.ends_with(" b")), "{:?}", bench.calls());
        assert_eq!(bench.count("rollback b"), usize::from(fails));
    }
}

#[tokio::test(start_paused = true)]
async fn an_unchanged_step_opens_no_way_past_those_around_it() {
    for fails in [true, false] {
        let bench = Bench::default();
        let b = bench.step("b").preparing(|_| async { Ok(Prepared::unchanged(json!(null), "done already")) });
        // Both are slow: what does not wait for the other one is seen to begin before it has ended.
        let slow = |id: &str| {
            let slowly = |_| async {
                tokio::time::sleep(std::time::Duration::from_secs(5)).await;
                Ok(())
            };
            bench.step(id).rolling_back(slowly).committing(slowly)
        };
        let builder = Pipeline::builder("p").step("a", slow("a")).step("b", b).step("c", slow("c"));
        let builder = if fails { builder.verify("fails", failing()) } else { builder };
        bench.run(&builder.build().unwrap()).await;
        let ends: Vec<_> = bench
            .entries()
            .await
            .iter()
            .filter_map(|entry| match entry {
                Entry::StepUndoing { step } => Some(format!("undoing {step}")),
                Entry::StepUndone { step, .. } => Some(format!("undone {step}")),
                Entry::StepCommitted { step } => Some(format!("committed {step}")),
                _ => None,
            })
            .collect();
        let expected: &[&str] =
            if fails { &["undoing c", "undone c", "undoing a", "undone a"] } else { &["committed a", "committed c"] };
        assert_eq!(ends, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn a_transient_failure_is_tried_again_and_the_key_stays_the_same() {
    let bench = Bench::default();
    let keys: Arc<std::sync::Mutex<Vec<(String, u32)>>> = Arc::default();
    let noted = keys.clone();
    let a = bench.step("a").applying(move |cx| {
        noted.lock().unwrap().push((cx.key(), cx.attempt()));
        async move { if cx.attempt() < 3 { Err(StepError::transient("seeded")) } else { Ok(json!(null)) } }
    });
    let retry = Retry { attempts: 3, ..Retry::FORWARD };
    let pipeline = Pipeline::builder("p").step_with("a", a, |options| options.retry(retry)).build().unwrap();
    assert_eq!(bench.run(&pipeline).await.outcome, Outcome::Committed);
    let keys = keys.lock().unwrap();
    assert_eq!(keys.iter().map(|(_, attempt)| *attempt).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(keys.iter().all(|(key, _)| *key == keys[0].0), "{keys:?}");
}
