//! `k8s.rollout` on a real control plane.

#![cfg(test)]

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use upgrade_core::context::OnConflict;
use upgrade_core::error::StepError;
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_k8s::steps::{RolloutConfig, RolloutStep, RolloutUndo};

use crate::world::{Corner, set};

fn make(corner: &Corner, workloads: &Value, more: &Value) -> RolloutStep {
    let mut config = json!({ "target": "cluster", "workloads": workloads });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let config: RolloutConfig = serde_json::from_value(config).unwrap();
    RolloutStep::from_config(config, &corner.build_context()).unwrap()
}

fn image(workload: &str, image: &str) -> Value {
    json!([{ "workload": workload, "images": { "web": image } }])
}

async fn prepared(step: &RolloutStep, test: &TestContext) -> RolloutUndo {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

/// Prepares, applies and expects a failure; rolls back and returns the error.
async fn fails(step: &RolloutStep, test: &TestContext) -> StepError {
    let undo = prepared(step, test).await;
    let error = step.apply(&test.forward(), &undo).await.expect_err("it cannot be rolled out");
    step.rollback(&test.back(), &undo, None).await.unwrap();
    error
}

#[tokio::test]
async fn a_deployment_is_rolled_out_and_its_template_put_back() {
    let Some(corner) = Corner::shared("rollout") else { return };
    corner.deployment("web", "shop/web:1", 3);
    corner.await_pods("web", "shop/web:1", 3);
    let before = corner.written("deployments,services,configmaps");
    let test = TestContext::new("rollout");
    let workloads = json!([{ "workload": "deployment/web", "replicas": 2, "images": { "web": "shop/web:2" },
        "env": { "web": { "MODE": null, "NEW": "yes" } }, "annotations": { "note": "two" } }]);
    let step = make(&corner, &workloads, &json!({}));
    let undo = prepared(&step, &test).await;
    let output = step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!(output.images["deployment/web"]["web"], "shop/web:2");
    corner.await_pods("web", "shop/web:2", 2);
    let changed = corner.get("deployment/web");
    assert_eq!(changed.at("/spec/template/spec/containers/0/env"), &json!([{ "name": "NEW", "value": "yes" }]));
    let managers: Vec<_> = changed.list("/metadata/managedFields").map(|each| each["manager"].clone()).collect();
    assert!(managers.contains(&json!("upgrade")) || managers.is_empty(), "{managers:?}");
    // A second call has nothing to do, and a run that meets it has nothing to change.
    step.apply(&test.forward(), &undo).await.unwrap();
    let again = step.prepare(&TestContext::new("again").forward()).await.unwrap();
    assert!(matches!(again, Prepared::Unchanged { .. }), "{again:?}");

    step.rollback(&test.back(), &undo, Some(&output)).await.unwrap();
    corner.await_pods("web", "shop/web:1", 3);
    assert_eq!(corner.written("deployments,services,configmaps"), before);
    step.rollback(&test.back(), &undo, None).await.unwrap();
}

#[tokio::test]
async fn stateful_sets_and_daemon_sets_are_rolled_out_as_one_unit() {
    let Some(corner) = Corner::shared("sets") else { return };
    let db = set("StatefulSet", "db", "shop/db:1", "replicas: 2\n  serviceName: db");
    corner.namespace.apply(&format!("{db}---{}", set("DaemonSet", "agent", "shop/agent:1", "")));
    corner.deployment("web", "shop/web:1", 2);
    corner.await_pods("db", "shop/db:1", 2);
    corner.await_pods("agent", "shop/agent:1", 3);
    corner.await_pods("web", "shop/web:1", 2);
    let before = corner.written("deployments,statefulsets,daemonsets");
    let workloads = json!([
        { "workload": "statefulset/db", "images": { "web": "shop/db:2" } },
        { "workload": "daemonset/agent", "images": { "web": "shop/agent:2" } },
        { "workload": "deployment/web", "images": { "*": "shop/web:2-slow" } },
    ]);
    for order in ["side_by_side", "sequence"] {
        let test = TestContext::new(order);
        let step = make(&corner, &workloads, &json!({ "order": order }));
        let undo = prepared(&step, &test).await;
        step.apply(&test.forward(), &undo).await.unwrap();
        corner.await_pods("db", "shop/db:2", 2);
        corner.await_pods("agent", "shop/agent:2", 3);
        corner.await_pods("web", "shop/web:2-slow", 2);
        step.rollback(&test.back(), &undo, None).await.unwrap();
        corner.await_pods("db", "shop/db:1", 2);
        corner.await_pods("agent", "shop/agent:1", 3);
        corner.await_pods("web", "shop/web:1", 2);
        assert_eq!(corner.written("deployments,statefulsets,daemonsets"), before);
    }
}

#[tokio::test]
async fn a_hopeless_rollout_is_known_within_seconds_with_its_cause() {
    let Some(corner) = Corner::shared("hopeless") else { return };
    corner.deployment("web", "shop/web:1", 2);
    corner.namespace.apply(&set("StatefulSet", "db", "shop/db:1", "replicas: 2\n  serviceName: db"));
    corner.namespace.apply(&set("DaemonSet", "agent", "shop/agent:1", ""));
    corner.await_pods("web", "shop/web:1", 2);
    corner.await_pods("db", "shop/db:1", 2);
    corner.await_pods("agent", "shop/agent:1", 3);
    for (workload, app, tag, reason, hint) in [
        ("deployment/web", "web", "2-missing", "shop/web:2-missing", "image's name"),
        ("deployment/web", "web", "2-crash", "CrashLoopBackOff", "log"),
        ("statefulset/db", "db", "2-crash", "CrashLoopBackOff", "log"),
        ("daemonset/agent", "agent", "2-missing", "shop/agent:2-missing", "image's name"),
    ] {
        let test = TestContext::new("hopeless");
        let step = make(&corner, &image(workload, &format!("shop/{app}:{tag}")), &json!({}));
        let began = Instant::now();
        let error = fails(&step, &test).await;
        assert!(began.elapsed() < Duration::from_secs(60), "{workload} {tag}: {:?}", began.elapsed());
        assert!(error.message().contains(workload) && error.message().contains("pod "), "{error:?}");
        assert!(error.message().contains(reason), "{error:?}");
        assert!(error.hint().unwrap().contains(hint), "{error:?}");
        corner.await_pods(app, &format!("shop/{app}:1"), if app == "agent" { 3 } else { 2 });
    }
}

#[tokio::test]
async fn a_quota_a_full_cluster_and_a_deadline_are_said() {
    let Some(corner) = Corner::shared("quota") else { return };
    corner.deployment("web", "shop/web:1", 1);
    corner.await_pods("web", "shop/web:1", 1);
    let test = TestContext::new("quota");
    // Never ready: only a deadline tells.
    let step = make(&corner, &image("deployment/web", "shop/web:2-unready"), &json!({ "deadline": "2s" }));
    let error = fails(&step, &test).await;
    assert!(error.message().contains("within 2 s") && error.message().contains("deployment/web"), "{error:?}");

    corner.namespace.kubectl(&["create", "quota", "few", "--hard", "pods=1"]);
    std::thread::sleep(Duration::from_secs(1));
    let error =
        fails(&make(&corner, &image("deployment/web", "shop/web:2"), &json!({})), &TestContext::new("few")).await;
    assert!(error.message().contains("exceeded quota"), "{error:?}");
    assert!(error.hint().unwrap().contains("quota"), "{error:?}");
    corner.await_pods("web", "shop/web:1", 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_without_a_node_is_hopeless_unless_somebody_makes_room_for_it() {
    let Some(corner) = Corner::shared("room") else { return };
    let manifest = crate::world::deployment("web", "shop/web:1", 1);
    corner.namespace.apply(&manifest);
    corner.await_pods("web", "shop/web:1", 1);
    let crowd = "{\"spec\":{\"template\":{\"spec\":{\"nodeSelector\":{\"kubernetes.io/hostname\":\"node9\"}}}}}";
    corner.namespace.kubectl(&["patch", "deployment", "web", "--patch", crowd]);
    // Its own rollout hangs by now; the next one has no node either.
    let step = make(&corner, &image("deployment/web", "shop/web:2"), &json!({ "deadline": "6s" }));
    let began = Instant::now();
    let error = fails(&step, &TestContext::new("room")).await;
    assert!(error.message().contains("Unschedulable") && began.elapsed() < Duration::from_secs(30), "{error:?}");

    let namespace = corner.namespace.name.clone();
    let cluster = corner.namespace.cluster().clone();
    let over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let told = over.clone();
    let autoscaler = std::thread::spawn(move || {
        let mut promised = std::collections::BTreeSet::new();
        while !told.load(std::sync::atomic::Ordering::Relaxed) {
            let pods = cluster.kubectl(["--namespace", &namespace, "get", "pods", "--output", "name"]);
            let new = pods.lines().filter(|pod| promised.insert((*pod).to_owned()));
            for pod in new.map(|name| name.trim_start_matches("pod/")) {
                let event = json!({ "apiVersion": "v1", "kind": "Event", "metadata": { "name": format!("{pod}.room") },
                    "involvedObject": { "kind": "Pod", "name": pod, "namespace": namespace }, "type": "Normal",
                    "reason": "TriggeredScaleUp", "message": "pod triggered scale-up", "source": {} });
                cluster.apply(&namespace, &event.to_string());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let error = fails(&step, &TestContext::new("promised")).await;
    over.store(true, std::sync::atomic::Ordering::Relaxed);
    autoscaler.join().unwrap();
    assert!(error.message().contains("not rolled out within 6 s"), "{error:?}");
}

#[tokio::test]
async fn somebody_elses_change_stops_it_and_is_kept() {
    let Some(corner) = Corner::shared("foreign") else { return };
    corner.deployment("web", "shop/web:1", 1);
    corner.await_pods("web", "shop/web:1", 1);
    let test = TestContext::new("foreign");
    let step = make(&corner, &image("deployment/web", "shop/web:2"), &json!({}));
    let undo = prepared(&step, &test).await;
    corner.namespace.kubectl(&["set", "image", "deployment/web", "web=shop/web:9"]);
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert!(error.as_conflict().is_some(), "{error:?}");
    let error = step.rollback(&test.back(), &undo, None).await.unwrap_err();
    assert!(error.as_conflict().is_some_and(|conflict| conflict.subject.contains("deployment")), "{error:?}");
    corner.await_pods("web", "shop/web:9", 1);
    let winning = TestContext::new("foreign").on_conflict(OnConflict::Overwrite);
    let undo = prepared(&step, &winning).await;
    corner.namespace.kubectl(&["set", "image", "deployment/web", "web=shop/web:8"]);
    step.apply(&winning.forward(), &undo).await.unwrap();
    corner.await_pods("web", "shop/web:2", 1);
}

#[tokio::test]
async fn what_could_not_be_rolled_out_is_refused_before_anything_changes() {
    let Some(corner) = Corner::shared("refused") else { return };
    corner.deployment("web", "shop/web:1", 1);
    corner.namespace.apply(&set("DaemonSet", "agent", "shop/agent:1", "updateStrategy: { type: OnDelete }"));
    corner.namespace.kubectl(&["autoscale", "deployment/web", "--max", "3"]);
    let refused = async |workloads: &Value| {
        let step = make(&corner, workloads, &json!({}));
        step.prepare(&TestContext::new("x").forward()).await.unwrap_err()
    };
    for (workloads, says, hint) in [
        (image("deployment/wbe", "x"), "deployment ", "kubectl get deployments"),
        (json!([{ "workload": "deployment/web", "images": { "wbe": "x" } }]), "there are: web", "container"),
        (image("daemonset/agent", "shop/agent:2"), "OnDelete", "RollingUpdate"),
        (
            json!([{ "workload": "deployment/web", "replicas": 2 }]),
            "HorizontalPodAutoscaler web",
            "leave `replicas` out",
        ),
        (image("deployment/web", ""), "invalid", "correct"),
    ] {
        let error = refused(&workloads).await;
        assert!(error.message().to_lowercase().contains(&says.to_lowercase()), "{error:?}");
        assert!(error.hint().unwrap().contains(hint), "{error:?}");
    }
    corner.namespace.kubectl(&["rollout", "pause", "deployment/web"]);
    let error = refused(&image("deployment/web", "shop/web:2")).await;
    assert!(error.message().contains("paused"), "{error:?}");
}

#[tokio::test]
async fn a_controller_that_applies_the_image_itself_is_named() {
    let Some(corner) = Corner::shared("manager") else { return };
    let manifest = crate::world::deployment("web", "shop/web:1", 1);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), manifest).unwrap();
    let path = file.path().to_str().unwrap();
    corner.namespace.kubectl(&["apply", "--server-side", "--field-manager", "gitops", "--filename", path]);
    let step = make(&corner, &image("deployment/web", "shop/web:2"), &json!({}));
    let error = step.prepare(&TestContext::new("x").forward()).await.unwrap_err();
    assert!(error.message().contains("gitops"), "{error:?}");
    let winning = TestContext::new("x").on_conflict(OnConflict::Overwrite);
    assert!(matches!(step.prepare(&winning.forward()).await.unwrap(), Prepared::Change { .. }));
}

#[tokio::test]
async fn a_workload_goes_back_to_a_revision_that_its_controller_keeps() {
    let Some(corner) = Corner::shared("revision") else { return };
    corner.deployment("web", "shop/web:1", 1);
    corner.namespace.apply(&set("StatefulSet", "db", "shop/db:1", "replicas: 1\n  serviceName: db"));
    corner.namespace.apply(&set("DaemonSet", "agent", "shop/agent:1", ""));
    for (workload, name) in [("deployment/web", "web"), ("statefulset/db", "db"), ("daemonset/agent", "agent")] {
        for tag in ["2", "3"] {
            corner.namespace.kubectl(&["rollout", "status", workload]);
            corner.namespace.kubectl(&["set", "image", workload, &format!("web=shop/{name}:{tag}")]);
        }
        corner.namespace.kubectl(&["rollout", "status", workload]);
        let before = corner.written("deployments,statefulsets,daemonsets");
        let test = TestContext::new("back");
        let step = make(&corner, &json!([{ "workload": workload, "revision": 1 }]), &json!({}));
        let undo = prepared(&step, &test).await;
        for _ in 0..2 {
            let output = step.apply(&test.forward(), &undo).await.unwrap();
            assert_eq!(output.images[workload]["web"], format!("shop/{name}:1"));
        }
        step.rollback(&test.back(), &undo, None).await.unwrap();
        assert_eq!(corner.written("deployments,statefulsets,daemonsets"), before);
        let none = make(&corner, &json!([{ "workload": workload, "revision": 77 }]), &json!({}));
        let error = none.prepare(&test.forward()).await.unwrap_err();
        assert!(error.message().contains("keeps no revision 77; it keeps: "), "{error:?}");
        assert!(error.hint().unwrap().contains("rollout history"), "{error:?}");
    }
}
