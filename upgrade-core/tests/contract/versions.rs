//! What must hold of versions before a run is admitted.

use std::sync::Arc;

use upgrade_core::executor::{ExecutorError, Outcome};
use upgrade_core::journal::Journal;
use upgrade_core::pipeline::{Builder, Channel, Pipeline, PresentVersion, Requirement};
use upgrade_core::verdict::Verdict;

use crate::scripted::{Answers, Bench};

fn reads(version: &'static str) -> Answers {
    Answers::new(move |_| Verdict::pass("running").with_fact("version", version))
}

fn pipeline(bench: &Bench, to: &str) -> Builder {
    Pipeline::builder("p").step("a", bench.step("a")).to(to)
}

async fn refusal(bench: &Bench, builder: Builder) -> String {
    match bench.try_run(&builder.build().unwrap()).await {
        Err(ExecutorError::Refused { message, hint: Some(_) }) => message,
        other => panic!("{other:?}"),
    }
}

async fn admitted(bench: &Bench, builder: Builder) {
    assert_eq!(bench.run(&builder.build().unwrap()).await.outcome, Outcome::Committed);
}

#[tokio::test(start_paused = true)]
async fn the_present_version_is_what_the_probe_reads() {
    let bench = Bench::default();
    let with = |version| pipeline(&bench, "2.0.0").from(">=1.5.0").present(reads(version), "version");
    let message = refusal(&bench, with("1.4.9")).await;
    assert!(message.contains("1.4.9"), "{message}");
    assert!(bench.calls().is_empty() && bench.journal.runs().await.unwrap().is_empty());
    admitted(&bench, with("v1.5.0\n")).await;
}

#[tokio::test(start_paused = true)]
async fn a_version_that_cannot_be_read_is_no_version() {
    let bench = Bench::default();
    let with = |answer: Answers| pipeline(&bench, "2.0.0").present(answer, "version");
    for answer in [Answers::new(|_| Verdict::pass("it says nothing")), reads("latest")] {
        let message = refusal(&bench, with(answer)).await;
        assert!(message.contains("cannot be read"), "{message}");
    }
}

#[tokio::test(start_paused = true)]
async fn without_a_probe_the_last_committed_run_tells_the_present_version() {
    let bench = Bench::default();
    admitted(&bench, pipeline(&bench, "1.2.0")).await;
    let message = refusal(&bench, pipeline(&bench, "1.1.0")).await;
    assert!(message.contains("newer than 1.1.0"), "{message}");
    let rolled_back = pipeline(&bench, "3.0.0").verify("no", crate::scripted::failing()).build().unwrap();
    assert!(matches!(bench.run(&rolled_back).await.outcome, Outcome::RolledBack { .. }));
    admitted(&bench, pipeline(&bench, "2.0.0")).await;
    let other = Pipeline::builder("other").step("a", bench.step("a")).to("1.0.0");
    admitted(&bench, other).await;
}

#[tokio::test(start_paused = true)]
async fn required_stops_are_not_skipped() {
    let bench = Bench::default();
    let to = |to| pipeline(&bench, to).required_stop("1.5.0").required_stop("2.0.0").present(reads("1.2.0"), "version");
    let message = refusal(&bench, to("3.0.0")).await;
    assert!(message.contains("1.2.0 → 1.5.0 → 2.0.0 → 3.0.0"), "{message}");
    admitted(&bench, to("1.5.0")).await;
}

#[tokio::test(start_paused = true)]
async fn a_version_of_another_channel_is_refused() {
    let bench = Bench::default();
    let message = refusal(&bench, pipeline(&bench, "2.0.0-rc.1").channel(Channel::Stable)).await;
    assert!(message.contains("stable"), "{message}");
    admitted(&bench, pipeline(&bench, "2.0.0-rc.1").channel(Channel::Beta)).await;
}

#[tokio::test(start_paused = true)]
async fn what_else_is_required_has_a_version_that_will_do() {
    let bench = Bench::default();
    let with = |version: &'static str| {
        pipeline(&bench, "2.0.0").requires(Requirement {
            name: "postgres".into(),
            present: PresentVersion { check: Arc::new(reads(version)), fact: "version".into() },
            version: ">=16".parse().unwrap(),
        })
    };
    let message = refusal(&bench, with("15.4.0")).await;
    assert!(message.contains("postgres is 15.4.0"), "{message}");
    admitted(&bench, with("16.1.0")).await;
}

#[tokio::test(start_paused = true)]
async fn production_takes_only_what_was_committed_in_staging() {
    let bench = Bench::default();
    let staging = |to: &str| pipeline(&bench, to).environment("staging");
    let production = |to: &str| pipeline(&bench, to).environment("production").require_committed_in("staging");
    let message = refusal(&bench, production("2.0.0")).await;
    assert!(message.contains("staging"), "{message}");
    let failed = staging("2.0.0").verify("no", crate::scripted::failing()).build().unwrap();
    bench.run(&failed).await;
    refusal(&bench, production("2.0.0")).await;
    admitted(&bench, staging("2.0.0")).await;
    admitted(&bench, production("2.0.0")).await;
    let changed = production("2.0.0").step("more", bench.step("more"));
    refusal(&bench, changed).await;
}
