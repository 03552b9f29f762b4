//! `k8s.exec`: what a control plane alone can show. Commands themselves run in `kubelet/exec.rs`.

#![cfg(test)]

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use upgrade_core::error::Class;
use upgrade_core::registry::BuildError;
use upgrade_core::step::{Prepared, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_k8s::steps::{Exec, ExecConfig};

use crate::world::{Corner, build_context};

pub(crate) fn make(corner: &Corner, more: &Value) -> Result<Exec, BuildError> {
    let mut config = json!({ "target": "cluster", "workload": "deployment/web", "command": ["true"] });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    if more.get("pod").is_some() || more.get("selector").is_some() {
        config.as_object_mut().unwrap().remove("workload");
    }
    let config: ExecConfig = serde_json::from_value(config).unwrap();
    Exec::from_config(config, &corner.build_context())
}

#[tokio::test]
async fn a_node_that_is_not_reached_is_said_and_nothing_has_begun() {
    let Some(corner) = Corner::shared("exec") else { return };
    corner.deployment("web", "shop/web:1", 1);
    corner.await_pods("web", "shop/web:1", 1);
    let before = corner.written("deployments,pods");
    let step = make(&corner, &json!({ "undo": ["false"] })).unwrap();
    let began = Instant::now();
    let test = TestContext::new("exec");
    let error = step.prepare(&test.forward()).await.unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(45), "{:?}", began.elapsed());
    assert_eq!(error.class(), Class::Transient, "{error:?}");
    assert!(
        error.message().contains("running a command in pod") || error.message().contains("does not answer"),
        "{error:?}"
    );
    assert!(error.hint().unwrap().contains("kubectl get nodes"), "{error:?}");
    assert_eq!(corner.written("deployments,pods"), before);
    // A plan tells what it would do all the same.
    let answer = step.prepare(&TestContext::new("plan").dry_run().forward()).await.unwrap();
    assert!(matches!(answer, Prepared::Change { .. }), "{answer:?}");
}

#[tokio::test]
async fn a_pod_that_is_not_there_is_said() {
    let Some(corner) = Corner::shared("nopod") else { return };
    corner.deployment("web", "shop/web:unready", 1);
    corner.await_none_ready("web");
    for (more, class, says, hint) in [
        (json!({ "workload": "deployment/api" }), Class::Permanent, "no deployment/api", "kubectl get"),
        (json!({ "pod": "web-0" }), Class::Permanent, "no pod web-0", "kubectl get"),
        (json!({}), Class::Transient, "no pod of deployment/web is ready", "k8s.workload"),
        (json!({ "selector": "app=web" }), Class::Transient, "(1 found)", "k8s.workload"),
        (json!({ "selector": "app=none" }), Class::Transient, "(0 found)", "k8s.workload"),
    ] {
        let step = make(&corner, &more).unwrap();
        let error = step.prepare(&TestContext::new("x").forward()).await.unwrap_err();
        assert_eq!(error.class(), class, "{error:?}");
        assert!(error.message().contains(says), "{error:?}");
        assert!(error.hint().unwrap().contains(hint), "{error:?}");
    }
}

#[tokio::test]
async fn who_may_not_is_told_what_to_be_given() {
    let Some(corner) = Corner::shared("forbidden") else { return };
    let Some(kubeconfig) = corner.namespace.cluster().kubeconfig_of("stranger") else { return };
    corner.deployment("web", "shop/web:1", 1);
    corner.await_pods("web", "shop/web:1", 1);
    corner.namespace.kubectl(&[
        "create",
        "role",
        "reader",
        "--verb=get,list",
        "--resource=pods,deployments,replicasets",
    ]);
    corner.namespace.kubectl(&["create", "rolebinding", "reader", "--role=reader", "--user=stranger"]);
    std::thread::sleep(Duration::from_secs(1));
    let config = json!({ "target": "cluster", "selector": "app=web", "command": ["true"] });
    let cx = build_context(&kubeconfig, &corner.namespace.name);
    let step = Exec::from_config(serde_json::from_value(config).unwrap(), &cx).unwrap();
    let error = step.prepare(&TestContext::new("x").forward()).await.unwrap_err();
    assert!(error.message().contains("pods/exec") || error.message().contains("forbidden"), "{error:?}");
    assert!(error.hint().unwrap().contains("pods/exec"), "{error:?}");
}

#[test]
fn keys_that_contradict_each_other_are_refused() {
    let Some(corner) = Corner::shared("keys") else { return };
    for (more, key) in [
        (json!({ "command": [] }), "command"),
        (json!({ "command": [""] }), "command"),
        (json!({ "undo": ["a", "b\u{0}"] }), "undo"),
        (json!({ "undo": ["true"], "no_effect": true }), "no_effect"),
        (json!({ "success": [] }), "success"),
        (json!({ "env": { "A-B": "x" } }), "env"),
        (json!({ "env": { "1A": "x" } }), "env"),
        (json!({ "pod": "a/b" }), "pod"),
        (json!({ "pod": "a", "selector": "app=web" }), "pod"),
        (json!({ "selector": "" }), "selector"),
        (json!({ "namespace": "a b" }), "namespace"),
    ] {
        let error = make(&corner, &more).unwrap_err();
        assert_eq!(error.key.as_deref(), Some(key), "{error}");
    }
}
