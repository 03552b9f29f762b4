//! Points 1 and 7 for steps that are made only when earlier outputs are there.

use std::sync::Arc;

use serde_json::json;
use upgrade_core::AnyStep;
use upgrade_core::entry::Cause;
use upgrade_core::executor::Outcome;
use upgrade_core::pipeline::{DeferredStep, Pipeline, StepOptions};
use upgrade_core::target::Target;

use crate::scripted::{Bench, Place, step};

/// A step `later` that turns out to change `/srv/later`, in a run that has locked `named`.
async fn outcome(bench: &Bench, named: Option<&str>) -> Outcome {
    let made = bench.clone();
    let later = DeferredStep {
        kind: "scripted".into(),
        irreversible: None,
        definition: json!({}),
        targets: named.map(|path| Arc::new(Place::path(path)) as Arc<dyn Target>).into_iter().collect(),
        build: Arc::new(move |_| Ok(AnyStep::reversible(made.step("later").on(Place::path("/srv/later"))))),
    };
    let pipeline = Pipeline::builder("p")
        .step("first", bench.step("first"))
        .deferred_step("later", later, StepOptions::default())
        .build()
        .unwrap();
    bench.run(&pipeline).await.outcome
}

#[tokio::test(start_paused = true)]
async fn a_step_that_turns_out_to_change_what_is_not_locked_is_not_begun() {
    for named in [None, Some("/srv/other")] {
        let bench = Bench::default();
        let outcome = outcome(&bench, named).await;
        let Outcome::RolledBack { cause: Some(Cause::Step { step: failed, error }), .. } = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(failed, step("later"));
        assert!(error.message().contains("path:/srv/later"), "{error}");
        assert!(error.hint().is_some_and(|hint| hint.contains("targets:")), "{error:?}");
        assert!(!bench.calls().iter().any(|call| call.contains("later")), "{:?}", bench.calls());
    }
}

#[tokio::test(start_paused = true)]
async fn a_step_that_turns_out_to_change_what_is_locked_is_applied() {
    for named in ["/srv", "/srv/later"] {
        assert_eq!(outcome(&Bench::default(), Some(named)).await, Outcome::Committed);
    }
}
