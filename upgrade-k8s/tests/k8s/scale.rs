//! `k8s.scale` on a real control plane.

#![cfg(test)]

use serde_json::{Value, json};
use upgrade_core::context::OnConflict;
use upgrade_core::error::StepError;
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_k8s::steps::{Scale, ScaleConfig, ScaleUndo};

use crate::world::{Corner, golden, set};

fn make(corner: &Corner, workloads: &Value, more: &Value) -> Scale {
    let mut config = json!({ "target": "cluster", "workloads": workloads });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let config: ScaleConfig = serde_json::from_value(config).unwrap();
    Scale::from_config(config, &corner.build_context()).unwrap()
}

fn one(workload: &str, replicas: u32) -> Value {
    json!([{ "workload": workload, "replicas": replicas }])
}

async fn prepared(step: &Scale, test: &TestContext) -> ScaleUndo {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

fn replica_set(name: &str, replicas: u32) -> String {
    set("ReplicaSet", name, &format!("shop/{name}:1"), &format!("replicas: {replicas}"))
}

#[tokio::test]
async fn a_service_is_stopped_as_one_unit_and_started_again() {
    let Some(corner) = Corner::shared("scale") else { return };
    corner.deployment("web", "shop/web:1", 3);
    corner.namespace.apply(&set("StatefulSet", "db", "shop/db:1", "replicas: 2\n  serviceName: db"));
    corner.namespace.apply(&replica_set("worker", 2));
    for (app, count) in [("web", 3), ("db", 2), ("worker", 2)] {
        corner.await_pods(app, &format!("shop/{app}:1"), count);
    }
    let before = corner.written("deployments,statefulsets,replicasets");
    let workloads = json!([
        { "workload": "deployment/web", "replicas": 0 },
        { "workload": "statefulset/db", "replicas": 0 },
        { "workload": "replicaset/worker", "replicas": 5 },
    ]);
    for order in ["side_by_side", "sequence"] {
        let test = TestContext::new(order);
        let step = make(&corner, &workloads, &json!({ "order": order }));
        let undo = prepared(&step, &test).await;
        if order == "sequence" {
            let mut replace = vec![(corner.namespace.name.as_str(), "shop")];
            let uids: Vec<_> = undo.workloads.iter().map(|each| each.uid.clone()).collect();
            replace.extend(uids.iter().map(|uid| (uid.as_str(), "00000000-0000-0000-0000-000000000001")));
            golden("k8s.scale.undo.v1.json", &undo, &replace);
        }
        let output = step.apply(&test.forward(), &undo).await.unwrap();
        assert_eq!((output.found["deployment/web"], output.replicas["deployment/web"]), (3, 0));
        // What the step has waited for is so at once.
        assert_eq!(corner.namespace.kubectl(&["get", "pods", "--selector", "app in (web,db)", "--output", "name"]), "");
        corner.await_pods("worker", "shop/worker:1", 5);
        let again = step.prepare(&TestContext::new("again").forward()).await.unwrap();
        assert!(matches!(again, Prepared::Unchanged { .. }), "{again:?}");
        step.apply(&test.forward(), &undo).await.unwrap();

        step.rollback(&test.back(), &undo, Some(&output)).await.unwrap();
        assert_eq!(corner.written("deployments,statefulsets,replicasets"), before);
        let ready = "jsonpath={.status.readyReplicas}";
        assert_eq!(corner.namespace.kubectl(&["get", "deployment/web", "--output", ready]), "3");
        corner.await_pods("worker", "shop/worker:1", 2);
        step.rollback(&test.back(), &undo, None).await.unwrap();
    }
}

#[tokio::test]
async fn a_pod_that_takes_its_time_to_end_is_waited_for() {
    let Some(corner) = Corner::shared("leaving") else { return };
    corner.deployment("web", "shop/web:1", 1);
    corner.await_pods("web", "shop/web:1", 1);
    // A finalizer keeps a pod as a long grace does; its ReplicaSet counts it no more.
    let pod = corner.namespace.kubectl(&["get", "pods", "--output", "jsonpath={.items[0].metadata.name}"]);
    let finalizers = |list: &str| {
        let patch = format!("{{\"metadata\":{{\"finalizers\":{list}}}}}");
        corner.namespace.kubectl(&["patch", "pod", &pod, "--type", "merge", "--patch", &patch]);
    };
    finalizers("[\"example.com/hold\"]");
    let test = TestContext::new("leaving");
    let step = make(&corner, &one("deployment/web", 0), &json!({ "deadline": "2s" }));
    let undo = prepared(&step, &test).await;
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert!(error.message().contains(&pod) && error.message().contains("after 2 s"), "{error:?}");
    finalizers("null");
    step.apply(&test.forward(), &undo).await.unwrap();
    step.rollback(&test.back(), &undo, None).await.unwrap();
    corner.await_pods("web", "shop/web:1", 1);
}

#[tokio::test]
async fn pods_that_cannot_come_are_said_and_what_crashes_can_be_stopped() {
    let Some(corner) = Corner::shared("crowded") else { return };
    corner.deployment("web", "shop/web:1", 1);
    corner.deployment("bad", "shop/bad:crash", 2);
    corner.await_pods("web", "shop/web:1", 1);
    corner.namespace.kubectl(&["create", "quota", "few", "--hard", "pods=4"]);
    std::thread::sleep(std::time::Duration::from_secs(1));
    let test = TestContext::new("crowded");
    let step = make(&corner, &one("deployment/web", 6), &json!({}));
    let undo = prepared(&step, &test).await;
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert!(error.message().contains("exceeded quota"), "{error:?}");
    step.rollback(&test.back(), &undo, None).await.unwrap();
    corner.await_pods("web", "shop/web:1", 1);

    let test = TestContext::new("crashing");
    let step = make(&corner, &one("deployment/bad", 0), &json!({}));
    let undo = prepared(&step, &test).await;
    assert!(!undo.workloads[0].was_complete);
    step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!(corner.namespace.kubectl(&["get", "pods", "--selector", "app=bad", "--output", "name"]), "");
    // It did not run when it was found, and need not now.
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(corner.get("deployment/bad").number("/spec/replicas"), 2);
}

#[tokio::test]
async fn what_belongs_to_somebody_else_is_refused_before_anything_changes() {
    let Some(corner) = Corner::shared("owned") else { return };
    corner.deployment("web", "shop/web:1", 2);
    corner.await_pods("web", "shop/web:1", 2);
    let refused = async |workload: &str, more: &Value| -> StepError {
        let step = make(&corner, &one(workload, 0), more);
        step.prepare(&TestContext::new("x").forward()).await.unwrap_err()
    };
    let set = corner.namespace.kubectl(&["get", "replicasets", "--output", "jsonpath={.items[0].metadata.name}"]);
    let error = refused(&format!("replicaset/{set}"), &json!({})).await;
    assert!(error.message().contains("belongs to Deployment web"), "{error:?}");
    corner.namespace.kubectl(&["autoscale", "deployment/web", "--max", "3", "--min", "2"]);
    let error = refused("deployment/web", &json!({})).await;
    assert!(error.message().contains("HorizontalPodAutoscaler web"), "{error:?}");
    assert!(error.hint().unwrap().contains("despite_autoscaler"), "{error:?}");
    let error = refused("deployment/none", &json!({})).await;
    assert!(error.hint().unwrap().contains("kubectl get deployments"), "{error:?}");

    let test = TestContext::new("despite");
    let step = make(&corner, &one("deployment/web", 0), &json!({ "despite_autoscaler": true }));
    let undo = prepared(&step, &test).await;
    assert!(undo.workloads[0].autoscaled);
    step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!(corner.namespace.kubectl(&["get", "pods", "--output", "name"]), "");
    step.rollback(&test.back(), &undo, None).await.unwrap();
    corner.await_pods("web", "shop/web:1", 2);

    let manifest = crate::world::deployment("api", "shop/api:1", 1);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), manifest).unwrap();
    let path = file.path().to_str().unwrap();
    corner.namespace.kubectl(&["apply", "--server-side", "--field-manager", "gitops", "--filename", path]);
    let error = refused("deployment/api", &json!({})).await;
    assert!(error.message().contains("gitops"), "{error:?}");
}

#[tokio::test]
async fn somebody_elses_number_stops_it_and_is_kept() {
    let Some(corner) = Corner::shared("number") else { return };
    corner.deployment("web", "shop/web:1", 1);
    corner.await_pods("web", "shop/web:1", 1);
    let test = TestContext::new("number");
    let step = make(&corner, &one("deployment/web", 2), &json!({}));
    let undo = prepared(&step, &test).await;
    corner.namespace.kubectl(&["scale", "deployment/web", "--replicas", "4"]);
    for error in [
        step.apply(&test.forward(), &undo).await.unwrap_err(),
        step.rollback(&test.back(), &undo, None).await.unwrap_err(),
    ] {
        assert!(error.as_conflict().is_some_and(|conflict| conflict.present == "4 pods"), "{error:?}");
    }
    assert_eq!(corner.get("deployment/web").number("/spec/replicas"), 4);
    let winning = TestContext::new("number").on_conflict(OnConflict::Overwrite);
    step.apply(&winning.forward(), &undo).await.unwrap();
    step.rollback(&winning.back(), &undo, None).await.unwrap();
    corner.await_pods("web", "shop/web:1", 1);
    corner.namespace.kubectl(&["delete", "deployment/web"]);
    corner.deployment("web", "shop/web:1", 1);
    let error = step.rollback(&test.back(), &undo, None).await.unwrap_err();
    assert!(error.as_conflict().is_some_and(|conflict| conflict.present.contains('-')), "{error:?}");
}

#[test]
fn what_has_no_number_of_pods_is_refused() {
    let Some(corner) = Corner::shared("wrong") else { return };
    for (workloads, key) in [
        (json!([]), "workloads"),
        (one("daemonset/agent", 0), "workloads.0.workload"),
        (
            json!([{ "workload": "deployment/a", "replicas": 1 }, { "workload": "deploy/a", "replicas": 2 }]),
            "workloads.1",
        ),
    ] {
        let config = serde_json::from_value(json!({ "target": "cluster", "workloads": workloads })).unwrap();
        let error = Scale::from_config(config, &corner.build_context()).unwrap_err();
        assert_eq!(error.key.as_deref(), Some(key), "{error}");
    }
}
