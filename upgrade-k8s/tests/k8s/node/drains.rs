//! Nodes drained: what goes, what stays, and what is said of it.

#![cfg(test)]

use std::time::{Duration, Instant};

use serde_json::json;
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;

use super::told::{fails, make, nodes, placed, pods_on, prepared, with_nodes, workload};
use crate::world::Corner;

/// A pod that nobody would make anew.
fn bare_pod(corner: &Corner, name: &str, node: &str) {
    corner.namespace.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{ name: {name} }}\nspec:\n      {}\n      \
         containers: [{{ name: web, image: \"shop/web:1\" }}]\n",
        placed(corner, Some(node))
    ));
    corner.namespace.kubectl(&["wait", "--for=condition=Ready", "--timeout=30s", &format!("pod/{name}")]);
}

#[tokio::test]
async fn a_budget_that_blocks_is_named_and_nothing_is_lost() {
    let Some(corner) = with_nodes("budget", &["a", "b"]) else { return };
    workload(&corner, "Deployment", "web", 2, Some("a"));
    corner.namespace.kubectl(&["create", "poddisruptionbudget", "stays", "--selector=app=web", "--min-available=2"]);
    let step = make(&corner, &json!({ "drain": { "deadline": "3s" } }));
    let began = Instant::now();
    let error = fails(&corner, &step).await;
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    for part in ["not drained within 3s", "/web-", "budget stays needs 2"] {
        assert!(error.message().contains(part), "{part}: {error:?}");
    }
    assert!(error.hint().unwrap().contains("k8s.budget"), "{error:?}");
    assert_eq!(pods_on(&corner, "a").trim(), "web web");
    // Where it lets one go at a time, they go one after the other.
    corner.namespace.kubectl(&["delete", "poddisruptionbudget", "stays"]);
    corner.namespace.kubectl(&[
        "patch",
        "deployment",
        "web",
        "--type=json",
        "--patch",
        "[{op: remove, path: /spec/template/spec/nodeSelector/kubernetes.io~1hostname}]",
    ]);
    corner.namespace.kubectl(&["rollout", "status", "deployment/web", "--timeout=30s"]);
    corner.namespace.kubectl(&["create", "poddisruptionbudget", "one", "--selector=app=web", "--max-unavailable=1"]);
    let (test, step) = (TestContext::new("nodes"), make(&corner, &json!({})));
    let undo = prepared(&step, &test).await;
    step.apply(&test.forward(), &undo).await.unwrap();
    corner.await_pods("web", "shop/web:1", 2);
}

#[tokio::test]
async fn pods_that_must_not_be_evicted_are_refused_before_anything_changes() {
    let Some(corner) = with_nodes("refused", &["a", "b"]) else { return };
    bare_pod(&corner, "alone", "b");
    let (step, before) = (make(&corner, &json!({})), nodes(&corner));
    let error = step.prepare(&TestContext::new("nodes").forward()).await.unwrap_err();
    assert!(error.message().contains("/alone has no controller"), "{error:?}");
    assert!(error.hint().unwrap().contains("force: true"), "{error:?}");
    let Prepared::Change { changes, .. } = step.prepare(&TestContext::new("plan").dry_run().forward()).await.unwrap()
    else {
        panic!()
    };
    assert!(changes[1].summary.as_deref().unwrap().contains("not as it is now"), "{changes:?}");
    assert_eq!(nodes(&corner), before);
    let step = make(&corner, &json!({ "drain": { "force": true, "grace_period": "0s", "deadline": "20s" } }));
    let test = TestContext::new("nodes");
    let Prepared::Change { undo, changes } = step.prepare(&test.forward()).await.unwrap() else { panic!() };
    assert!(changes[0].undo_loses.as_deref().unwrap().contains("without a controller"), "{changes:?}");
    step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!(pods_on(&corner, "b"), "");
}

#[tokio::test]
async fn a_pod_that_does_not_end_is_named_and_its_eviction_is_not_asked_for_again() {
    let Some(corner) = with_nodes("stays", &["a", "b"]) else { return };
    workload(&corner, "Deployment", "web", 2, Some("a"));
    corner.namespace.kubectl(&["create", "poddisruptionbudget", "stays", "--selector=app=web", "--min-available=2"]);
    let pods = corner.namespace.kubectl(&["get", "pods", "--output", "name"]);
    let held = "--patch={\"metadata\":{\"finalizers\":[\"example.com/stays\"]}}";
    for pod in pods.lines() {
        corner.namespace.kubectl(&["patch", pod, held]);
    }
    let step = make(&corner, &json!({ "drain": { "deadline": "10s" } }));
    let test = TestContext::new("nodes");
    let undo = prepared(&step, &test).await;
    let cx = test.forward();
    let (done, ()) = tokio::join!(step.apply(&cx, &undo), async {
        // Refused by the budget first, and then deleted by somebody else.
        tokio::time::sleep(Duration::from_secs(1)).await;
        corner.namespace.kubectl(&["delete", "deployment", "web"]);
        corner.namespace.kubectl(&["delete", "pods", "--all", "--wait=false"]);
    });
    let error = done.unwrap_err();
    assert!(error.message().contains("was evicted and has not ended"), "{error:?}");
    assert!(error.hint().unwrap().contains("finalizers"), "{error:?}");
    let told = test.reported().len();
    assert!(told < 100, "{told} times round: it does not wait");
    for pod in pods.lines() {
        corner.namespace.kubectl(&["patch", pod, "--type=json", "--patch=[{op: remove, path: /metadata/finalizers}]"]);
    }
    step.rollback(&test.back(), &undo, None).await.unwrap();
}

#[tokio::test]
async fn fifty_pods_are_drained_together() {
    let Some(corner) = with_nodes("fifty", &["a", "b"]) else { return };
    corner.namespace.kubectl(&["cordon", &format!("{}-b", corner.namespace.name)]);
    workload(&corner, "Deployment", "web", 50, None);
    corner.namespace.kubectl(&["uncordon", &format!("{}-b", corner.namespace.name)]);
    assert_eq!(pods_on(&corner, "a").split_whitespace().count(), 50);
    let nodes = json!([format!("{}-a", corner.namespace.name)]);
    let step = make(&corner, &json!({ "selector": null, "nodes": nodes, "command": null, "version": null }));
    let test = TestContext::new("nodes");
    let undo = prepared(&step, &test).await;
    let began = Instant::now();
    step.apply(&test.forward(), &undo).await.unwrap();
    println!("drained in {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    assert_eq!(pods_on(&corner, "a"), "");
    corner.await_pods("web", "shop/web:1", 50);
}
