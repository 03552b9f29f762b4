//! Runs of machines that share no journal, kept apart by a Lease.

#![cfg(test)]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use upgrade_core::executor::{Executor, ExecutorError, Interrupt, Outcome, Report, RunOptions};
use upgrade_core::file::{LoadOptions, parse};
use upgrade_core::journal::{Journal, MemoryJournal};
use upgrade_core::pipeline::Pipeline;

use crate::world::{Corner, registry};

fn pipeline(kubeconfig: &Path, namespace: &str, image: &str, more: &str) -> Pipeline {
    let document = format!(
        "upgrade: shop\n\
         targets: {{ cluster: {{ uses: k8s, with: {{ kubeconfig: \"{}\", namespace: {namespace}{more} }} }} }}\n\
         steps:\n  - id: roll\n    uses: k8s.rollout\n    with: {{ target: cluster, workloads: [{{ workload: deployment/web, images: {{ web: \"{image}\" }} }}] }}\n",
        kubeconfig.display(),
    );
    parse(&document, "pipeline.yaml".as_ref(), "/".as_ref(), &LoadOptions::default(), &registry()).unwrap()
}

async fn run(journal: &MemoryJournal, pipeline: &Pipeline) -> Result<Report, ExecutorError> {
    let executor = Executor::new(Arc::new(journal.clone()));
    executor.run(pipeline, &RunOptions::default(), &Interrupt::new()).await
}

fn lease(corner: &Corner) -> String {
    corner.namespace.kubectl(&["get", "leases", "--output", "name"])
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_runs_from_two_machines_exactly_one_goes_through() {
    let Some(corner) = Corner::shared("claims") else { return };
    corner.deployment("web", "shop/web:1", 2);
    let elsewhere = Corner::shared("elsewhere").unwrap();
    elsewhere.deployment("web", "shop/web:1", 1);
    let of = |corner: &Corner, image: &str| pipeline(corner.kubeconfig(), &corner.namespace.name, image, "");
    for round in 0..3 {
        let (here, there) = (MemoryJournal::new(), MemoryJournal::new());
        let images = [format!("shop/web:{round}-here"), format!("shop/web:{round}-there")];
        let (ours, theirs) = (of(&corner, &images[0]), of(&corner, &images[1]));
        let (third, other) = (MemoryJournal::new(), of(&elsewhere, &format!("shop/web:{round}-x")));
        let (ours, theirs, other) = tokio::join!(run(&here, &ours), run(&there, &theirs), run(&third, &other));
        let through: Vec<_> = [&ours, &theirs].iter().map(|report| report.is_ok()).collect();
        assert!(through == [true, false] || through == [false, true], "{ours:?} {theirs:?}");
        let winner = usize::from(through[1]);
        corner.await_pods("web", &images[winner], 2);
        let refused = [ours, theirs].into_iter().find_map(Result::err).unwrap();
        let ExecutorError::Refused { message, hint } = refused else { panic!("{refused:?}") };
        assert!(message.contains("claimed by"), "{message}");
        assert!(hint.unwrap().contains("upgrade rollback"), "a way out is named");
        assert_eq!(other.unwrap().outcome, Outcome::Committed, "another namespace is nobody else's");
        let loser = if winner == 0 { &there } else { &here };
        let runs = loser.runs().await.unwrap();
        assert!(runs.iter().all(|run| run.state.unwrap().is_final()), "a run that was refused blocks nobody: {runs:?}");
        assert_eq!(lease(&corner), "", "none is left");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_driver_died_keeps_others_out_until_it_is_over() {
    let Some(corner) = Corner::shared("died") else { return };
    corner.deployment("web", "shop/web:1", 1);
    let of = |image: &str| pipeline(corner.kubeconfig(), &corner.namespace.name, image, "");
    let here = MemoryJournal::new();
    let (journal, slow) = (here.clone(), of("shop/web:2-unready"));
    let driven = tokio::spawn(async move { run(&journal, &slow).await });
    while lease(&corner).is_empty() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    driven.abort();
    assert!(driven.await.unwrap_err().is_cancelled());

    let there = MemoryJournal::new();
    let refused = run(&there, &of("shop/web:3")).await.unwrap_err();
    assert!(refused.to_string().contains("claimed by"), "{refused}");

    let id = here.runs().await.unwrap()[0].run.clone();
    let executor = Executor::new(Arc::new(here.clone()));
    let back = upgrade_core::entry::Demand::Rollback { reason: "it is not going to be ready".into() };
    let old = of("shop/web:2-unready");
    executor.demand(&old, &id, back, &RunOptions::default(), &Interrupt::new()).await.unwrap();
    assert_eq!(lease(&corner), "");

    // A claim that the end of a run could not take away is known to be nobody's by the journal of that run.
    let runs = format!(
        "upgrade-rs.github.io/runs={{\"{id}\":{{\"by\":\"x\",\"since\":\"2026-01-01T00:00:00Z\",\"locks\":[\"namespace {}\"]}}}}",
        corner.namespace.name
    );
    corner.namespace.apply("apiVersion: coordination.k8s.io/v1\nkind: Lease\nmetadata: { name: upgrade }\n");
    corner.namespace.kubectl(&["annotate", "lease", "upgrade", &runs]);
    assert!(run(&there, &of("shop/web:3")).await.unwrap_err().to_string().contains("claimed by x"));
    assert_eq!(run(&here, &of("shop/web:3")).await.unwrap().outcome, Outcome::Committed);
    corner.await_pods("web", "shop/web:3", 1);
    assert_eq!(lease(&corner), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_write_leases_is_told_what_to_allow_or_to_set() {
    let Some(corner) = Corner::shared("noleases") else { return };
    let Some(stranger) = corner.namespace.cluster().kubeconfig_of("stranger") else { return };
    corner.deployment("web", "shop/web:1", 1);
    let (namespace, user) = (&corner.namespace.name, "stranger");
    corner.namespace.apply(
        "apiVersion: rbac.authorization.k8s.io/v1\nkind: Role\nmetadata: { name: upgrader }\nrules:\n\
         - { apiGroups: [\"\"], resources: [namespaces, pods, events], verbs: [get, list, watch] }\n\
         - { apiGroups: [apps], resources: [deployments, replicasets], verbs: [get, list, watch, patch] }\n",
    );
    corner.namespace.kubectl(&["create", "rolebinding", "upgrader", "--role", "upgrader", "--user", user]);
    let journal = MemoryJournal::new();
    let refused = run(&journal, &pipeline(&stranger, namespace, "shop/web:2", "")).await.unwrap_err();
    let ExecutorError::Refused { message, hint } = refused else { panic!("{refused:?}") };
    assert!(message.contains("lease") && hint.as_ref().unwrap().contains("lease: false"), "{message} {hint:?}");
    let report = run(&journal, &pipeline(&stranger, namespace, "shop/web:2", ", lease: false")).await.unwrap();
    assert_eq!(report.outcome, Outcome::Committed);
}
