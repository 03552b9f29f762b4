//! `k8s.apply` on a real control plane.

#![cfg(test)]

use serde_json::{Value, json};
use upgrade_core::context::OnConflict;
use upgrade_core::error::Class;
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_k8s::steps::{Apply, ApplyConfig, ApplyUndo};

use crate::world::{Corner, deployment};

const KINDS: &str = "deployments,services,configmaps,secrets,serviceaccounts,persistentvolumeclaims";

fn make(corner: &Corner, with: &Value) -> Apply {
    let mut config = json!({ "target": "cluster" });
    config.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
    let config: ApplyConfig = serde_json::from_value(config).unwrap();
    Apply::from_config(config, &corner.build_context()).unwrap()
}

fn config_map(name: &str, data: &Value) -> Value {
    json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": name }, "data": data })
}

async fn prepared(step: &Apply, test: &TestContext) -> ApplyUndo {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn objects_are_made_and_changed_and_all_of_it_taken_back() {
    let Some(corner) = Corner::shared("apply") else { return };
    corner.deployment("web", "shop/web:1", 2);
    corner.await_pods("web", "shop/web:1", 2);
    corner.namespace.kubectl(&[
        "create",
        "configmap",
        "shop",
        "--from-literal",
        "MODE=old",
        "--from-literal",
        "KEEP=1",
    ]);
    corner.namespace.kubectl(&["create", "secret", "generic", "keys", "--from-literal", "TOKEN=hidden-before"]);
    let before = corner.written(KINDS);

    let directory = tempfile::tempdir().unwrap();
    let manifests = format!(
        "{}---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{ name: shop, labels: {{ release: two }} }}\ndata: {{ MODE: new }}\n",
        deployment("web", "shop/web:2", 2)
    );
    std::fs::write(directory.path().join("a.yaml"), manifests).unwrap();
    let claim = json!({ "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": { "name": "disk" }, "spec":
        { "accessModes": ["ReadWriteOnce"], "resources": { "requests": { "storage": "1024Mi" } } } });
    let service = json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": "web" },
        "spec": { "selector": { "app": "web" }, "ports": [{ "port": 80, "protocol": "TCP" }] } });
    let account = json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": "worker" } });
    let secret = json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "keys" },
        "stringData": { "TOKEN": "hidden-after" } });
    let step = make(
        &corner,
        &json!({ "manifests": [directory.path()], "objects": [claim, service, account, secret], "force": true }),
    );
    let test = TestContext::new("apply");
    let Prepared::Change { undo, changes, .. } = step.prepare(&test.forward()).await.unwrap() else {
        panic!("a change")
    };
    let lines = format!("{changes:?}");
    for expected in ["MODE: old -> new", "image: shop/web:1 -> shop/web:2", "serviceaccount", "data.TOKEN: changed"] {
        assert!(lines.contains(expected), "{expected}: {lines}");
    }
    assert!(!lines.contains("hidden") && !serde_json::to_string(&undo).unwrap().contains("hidden"), "{lines}");
    // What is read later is what was planned.
    std::fs::remove_file(directory.path().join("a.yaml")).unwrap();

    let output = step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!((output.created.len(), output.changed.len()), (3, 3), "{output:?}");
    corner.await_pods("web", "shop/web:2", 2);
    assert_eq!(corner.get("configmap/shop").at("/data"), &json!({ "MODE": "new", "KEEP": "1" }));
    assert_eq!(corner.get("secret/keys").text("/data/TOKEN"), "aGlkZGVuLWFmdGVy");
    step.apply(&test.forward(), &undo).await.unwrap();

    // What others do to other fields is theirs, and stays.
    corner.namespace.kubectl(&["annotate", "configmap", "shop", "owner=somebody"]);
    step.rollback(&test.back(), &undo, Some(&output)).await.unwrap();
    corner.await_pods("web", "shop/web:1", 2);
    corner.namespace.kubectl(&["annotate", "configmap", "shop", "owner-"]);
    assert_eq!(corner.written(KINDS), before);
    step.rollback(&test.back(), &undo, None).await.unwrap();
}

#[tokio::test]
async fn what_is_there_already_is_left_alone() {
    let Some(corner) = Corner::shared("same") else { return };
    let step = make(&corner, &json!({ "objects": [config_map("shop", &json!({ "A": "1" }))] }));
    let test = TestContext::new("apply");
    let undo = prepared(&step, &test).await;
    step.apply(&test.forward(), &undo).await.unwrap();
    let again = step.prepare(&TestContext::new("again").forward()).await.unwrap();
    assert!(matches!(again, Prepared::Unchanged { .. }), "{again:?}");
}

#[tokio::test]
async fn somebody_elses_change_of_the_same_field_stops_it_and_is_kept() {
    let Some(corner) = Corner::shared("foreign") else { return };
    corner.namespace.kubectl(&["create", "configmap", "shop", "--from-literal", "MODE=old"]);
    let objects = json!({ "force": true, "objects": [config_map("shop", &json!({ "MODE": "new" })), config_map("made", &json!({ "A": "1" }))] });
    let step = make(&corner, &objects);
    let test = TestContext::new("apply");
    let undo = prepared(&step, &test).await;
    let foreign = "{\"data\":{\"MODE\":\"foreign\"}}";
    corner.namespace.kubectl(&["patch", "configmap", "shop", "--patch", foreign]);
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert!(error.as_conflict().is_some(), "{error:?}");
    assert_eq!(corner.get("configmap/shop").text("/data/MODE"), "foreign");
    corner.namespace.kubectl(&["patch", "configmap", "shop", "--patch", "{\"data\":{\"MODE\":\"old\"}}"]);
    step.apply(&test.forward(), &undo).await.unwrap();
    corner.namespace.kubectl(&["patch", "configmap", "shop", "--patch", foreign]);
    let error = step.rollback(&test.back(), &undo, None).await.unwrap_err();
    assert!(error.as_conflict().is_some() && error.message().contains("configmap"), "{error:?}");
    let winning = test.on_conflict(OnConflict::Overwrite);
    step.rollback(&winning.back(), &undo, None).await.unwrap();
    assert_eq!(corner.get("configmap/shop").text("/data/MODE"), "old");
    assert!(!corner.written("configmaps").contains("made"));
}

#[tokio::test]
async fn what_cannot_be_applied_is_said_before_anything_changes() {
    let Some(corner) = Corner::shared("refused") else { return };
    corner.namespace.kubectl(&["create", "configmap", "ours", "--from-literal", "A=1"]);
    let owned = config_map("owned", &json!({ "A": "1" })).to_string();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), owned).unwrap();
    let path = file.path().to_str().unwrap();
    corner.namespace.kubectl(&["apply", "--server-side", "--field-manager", "gitops", "--filename", path]);
    let before = corner.written(KINDS);
    for (object, says, hint) in [
        (
            json!({ "apiVersion": "example.com/v1", "kind": "Widget", "metadata": { "name": "w" } }),
            "no example.com/v1 Widget",
            "CustomResourceDefinition",
        ),
        (
            json!({ "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "w" }, "spec": { "replicas": -1 } }),
            "deployment",
            "correct",
        ),
        (
            json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "w" }, "data": "text" }),
            "data",
            "correct the manifest",
        ),
        (config_map("owned", &json!({ "A": "2" })), "gitops", "force"),
    ] {
        let step = make(&corner, &json!({ "objects": [config_map("first", &json!({})), object] }));
        let error = step.prepare(&TestContext::new("x").forward()).await.unwrap_err();
        assert_eq!(error.class(), Class::Permanent, "{error:?}");
        assert!(error.message().contains(says), "{error:?}");
        assert!(error.hint().unwrap().contains(hint), "{error:?}");
        assert_eq!(corner.written(KINDS), before);
    }
    let twice = json!({ "objects": [config_map("a", &json!({})), config_map("a", &json!({}))] });
    let error = make(&corner, &twice).prepare(&TestContext::new("x").forward()).await.unwrap_err();
    assert!(error.message().contains("twice"), "{error:?}");
}

#[tokio::test]
async fn a_namespace_and_what_is_in_it_are_made_and_removed() {
    let Some(corner) = Corner::shared("space") else { return };
    let own = format!("{}-own", corner.namespace.name);
    let mut inside = config_map("inside", &json!({ "A": "1" }));
    inside["metadata"]["namespace"] = json!(own);
    let space = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": own } });
    let step = make(&corner, &json!({ "objects": [inside, space] }));
    let test = TestContext::new("apply");
    let undo = prepared(&step, &test).await;
    step.apply(&test.forward(), &undo).await.unwrap();
    let read =
        corner.namespace.cluster().kubectl(["--namespace", &own, "get", "configmap", "inside", "--output", "name"]);
    assert_eq!(read, "configmap/inside");
    step.rollback(&test.back(), &undo, None).await.unwrap();
    let there = corner.namespace.cluster().command(["get", "namespace", &own]).output().unwrap();
    assert!(!there.status.success(), "it is gone");
}

#[tokio::test]
async fn a_workload_among_them_that_is_hopeless_fails_it() {
    let Some(corner) = Corner::shared("bad") else { return };
    corner.deployment("web", "shop/web:1", 1);
    corner.await_pods("web", "shop/web:1", 1);
    let before = corner.written(KINDS);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), deployment("web", "shop/web:2-missing", 1)).unwrap();
    let step = make(&corner, &json!({ "manifests": [file.path()], "force": true }));
    let test = TestContext::new("apply");
    let undo = prepared(&step, &test).await;
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert!(error.message().contains("deployment/web") && error.message().contains("2-missing"), "{error:?}");
    step.rollback(&test.back(), &undo, None).await.unwrap();
    corner.await_pods("web", "shop/web:1", 1);
    assert_eq!(corner.written(KINDS), before);
}
