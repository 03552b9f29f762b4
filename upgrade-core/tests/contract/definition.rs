//! Points 8 and 15: bound to its definition and its targets, and not to what is upgraded.

use std::path::Path;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use upgrade_core::AnyStep;
use upgrade_core::entry::{Demand, Entry};
use upgrade_core::executor::state::Run;
use upgrade_core::executor::{Answer, Executor, ExecutorError, Interrupt, Outcome, RunOptions};
use upgrade_core::file::{LoadOptions, parse, reload};
use upgrade_core::journal::{FileJournal, Journal};
use upgrade_core::names::LockName;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::registry::Registry;
use upgrade_core::testkit::toy::{SetText, ToyWorld};
use upgrade_core::units::Span;

use crate::scripted::{Bench, Place, Scripted, nap, rollback, why};

/// Stops a run of two steps between them.
async fn stopped(bench: &Bench, pipeline: &Pipeline) {
    let driver = bench.spawn(pipeline);
    nap(500).await;
    let answer = bench.demand(pipeline, Demand::Stop { reason: why() }).await;
    assert_eq!(answer, Answer::Granted);
    let outcome = driver.await.unwrap().unwrap().outcome;
    assert!(matches!(outcome, Outcome::Held { .. }), "{outcome:?}");
}

fn slow(bench: &Bench) -> Scripted {
    bench.step("a").applying(|_| async {
        nap(3_000).await;
        Ok(json!(null))
    })
}

fn refusal<T: std::fmt::Debug>(result: Result<T, ExecutorError>) -> String {
    match result {
        Err(ExecutorError::Refused { message, hint: Some(_) }) => message,
        other => panic!("{other:?}"),
    }
}

fn defined(bench: &Bench, version: u32) -> Pipeline {
    let b = bench.step("b").defined(json!({ "version": version }));
    Pipeline::builder("p").step("a", slow(bench)).step("b", b).build().unwrap()
}

#[tokio::test(start_paused = true)]
async fn another_definition_is_refused_and_adopted_only_on_record() {
    let bench = Bench::default();
    stopped(&bench, &defined(&bench, 1)).await;
    let message = refusal(bench.resume(&defined(&bench, 2)).await);
    assert!(message.contains("version"), "{message}");
    assert_eq!(bench.count("apply b"), 0);

    let options = RunOptions { adopt: true, ..RunOptions::default() };
    let run = bench.last_run().await;
    let resumed = bench.executor().resume(&defined(&bench, 2), &run, &options, &Interrupt::new()).await;
    assert_eq!(resumed.unwrap().outcome, Outcome::Committed);
    let adopted = bench.entries().await.into_iter().find_map(|entry| match entry {
        Entry::DefinitionAdopted { difference, .. } => Some(difference),
        _ => None,
    });
    assert!(adopted.unwrap().iter().any(|line| line.contains("version")));
}

#[tokio::test(start_paused = true)]
async fn a_step_that_was_begun_cannot_be_adopted_away() {
    let bench = Bench::default();
    stopped(&bench, &defined(&bench, 1)).await;
    let without = Pipeline::builder("p").step("b", bench.step("b")).build().unwrap();
    let options = RunOptions { adopt: true, ..RunOptions::default() };
    let run = bench.last_run().await;
    let message = refusal(bench.executor().resume(&without, &run, &options, &Interrupt::new()).await);
    assert!(message.contains("`a`"), "{message}");
}

#[tokio::test(start_paused = true)]
async fn another_timeout_is_the_same_definition() {
    let bench = Bench::default();
    stopped(&bench, &defined(&bench, 1)).await;
    let b = bench.step("b").defined(json!({ "version": 1 }));
    let patient = Pipeline::builder("p")
        .step("a", slow(&bench))
        .step_with("b", b, |options| options.timeout(Span::from_secs(7)))
        .build()
        .unwrap();
    assert_eq!(bench.resume(&patient).await.unwrap().outcome, Outcome::Committed);
}

#[tokio::test(start_paused = true)]
async fn a_changed_input_is_refused_forward_and_does_not_keep_a_run_from_going_back() {
    let directory = tempfile::tempdir().unwrap();
    let input = directory.path().join("archive");
    std::fs::write(&input, "as it was").unwrap();
    let bench = Bench::default();
    let b = bench.step("b").reading(input.clone());
    let pipeline = Pipeline::builder("p").step("a", slow(&bench)).step("b", b).build().unwrap();
    stopped(&bench, &pipeline).await;
    std::fs::write(&input, "as it is now").unwrap();
    let message = refusal(bench.resume(&pipeline).await);
    assert!(message.contains("archive"), "{message}");
    std::fs::remove_file(&input).unwrap();
    let report = bench.take_up(&pipeline, rollback()).await;
    assert!(matches!(report.outcome, Outcome::RolledBack { .. }), "{report:?}");
}

#[tokio::test(start_paused = true)]
async fn another_target_of_the_same_name_is_refused() {
    let bench = Bench::default();
    let on = |identity| {
        let a = slow(&bench).on(Place(LockName::new("db", "orders").unwrap(), identity));
        Pipeline::builder("p").step("a", a).step("b", bench.step("b")).build().unwrap()
    };
    stopped(&bench, &on("cluster 1")).await;
    let message = refusal(bench.resume(&on("cluster 2")).await);
    assert!(message.contains("cluster 1") && message.contains("cluster 2"), "{message}");
    assert_eq!(bench.count("apply b"), 0);
    assert_eq!(bench.resume(&on("cluster 1")).await.unwrap().outcome, Outcome::Committed);
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Set {
    name: String,
    text: String,
}

#[tokio::test(start_paused = true)]
async fn a_run_is_resumed_from_the_journal_alone() {
    let bench = Bench::default();
    let world = ToyWorld::new([("a", "old"), ("b", "old")]);
    let mut registry = Registry::new();
    let (toys, scripted) = (world.clone(), slow(&bench));
    registry
        .step("toy.set", "Sets a text.", move |config: Set, _| {
            Ok(AnyStep::reversible(SetText::new(&toys, &config.name, &config.text)))
        })
        .step("toy.slow", "Takes its time.", move |_: Set, _| Ok(AnyStep::reversible(scripted.clone())));
    let text = "upgrade: p\nto: 1.1.0\nvars: { text: fresh }\nsteps:\n  \
        - { id: a, uses: toy.set, with: { name: a, text: \"${text}\" } }\n  \
        - { id: slow, uses: toy.slow, with: { name: a, text: a } }\n  \
        - { id: b, uses: toy.set, with: { name: b, text: \"${text}\" } }\n";
    let options = LoadOptions { variables: [("text".into(), "newest".into())].into(), ..LoadOptions::default() };
    let pipeline = parse(text, Path::new("upgrade.yaml"), Path::new("/srv"), &options, &registry).unwrap();
    stopped(&bench, &pipeline).await;
    drop(pipeline);

    let run = Run::replay(&bench.records().await).unwrap();
    assert_eq!(run.definition().base_dir, Path::new("/srv"));
    let again = reload(run.definition(), &registry).unwrap();
    assert_eq!(bench.resume(&again).await.unwrap().outcome, Outcome::Committed);
    assert_eq!([world.get("a"), world.get("b")], [Some("newest".into()), Some("newest".into())]);
}

#[tokio::test]
async fn a_pipeline_that_changes_the_home_of_its_journal_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let home = directory.path().join("app/state");
    let journal: Arc<dyn Journal> = Arc::new(FileJournal::open(&home).unwrap());
    let bench = Bench::default();
    for target in [directory.path().join("app"), home.clone(), home.join("runs")] {
        let a = bench.step("a").on(Place::path(target.to_str().unwrap()));
        let pipeline = Pipeline::builder("p").step("a", a).build().unwrap();
        let executor = Executor::new(journal.clone());
        let message = refusal(executor.run(&pipeline, &RunOptions::default(), &Interrupt::new()).await);
        assert!(message.contains("journal lives in"), "{message}");
        let plan = executor.plan(&pipeline).await.unwrap();
        assert!(plan.refused.is_some());
    }
    assert!(bench.calls().iter().all(|call| call == "prepare a"), "{:?}", bench.calls());
    assert!(journal.runs().await.unwrap().is_empty());
}
