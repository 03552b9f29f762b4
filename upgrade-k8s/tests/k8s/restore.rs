//! `k8s.restore` on a real control plane.

#![cfg(test)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use upgrade_core::context::OnConflict;
use upgrade_core::error::Class;
use upgrade_core::executor::{Executor, Interrupt, Outcome, RunOptions};
use upgrade_core::file::{LoadOptions, parse};
use upgrade_core::journal::MemoryJournal;
use upgrade_core::step::{Change, Effect, Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_k8s::steps::{Restore, RestoreConfig, RestoreUndo};

use crate::backup::{self, KEY, await_bound, kept, key, populate, test, tidy};
use crate::world::{Corner, registry};

const KINDS: &str = "configmaps,secrets,persistentvolumeclaims,services,deployments";

fn make(corner: &Corner, backup: &Path, with: &Value) -> Restore {
    let mut config = json!({ "target": "cluster", "backup": backup });
    config.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
    let config: RestoreConfig = serde_json::from_value(config).unwrap();
    Restore::from_config(config, &corner.build_context()).unwrap()
}

async fn prepared(step: &Restore, test: &TestContext) -> (RestoreUndo, Vec<Change>) {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, changes } => (undo, changes),
        other => panic!("{other:?}"),
    }
}

/// All that is written there, whatever the order of its keys.
fn written(corner: &Corner) -> Value {
    serde_json::from_str(&corner.written(KINDS)).unwrap()
}

/// Keeps the objects of a namespace in a file.
async fn keep(corner: &Corner, directory: &Path, with: &Value) -> PathBuf {
    let step = backup::make(corner, directory, with);
    kept(&step, &test("keep")).await.1.path
}

fn patch(corner: &Corner, object: &str, patch: &str) {
    corner.namespace.kubectl(&["patch", object, "--type", "merge", "--patch", patch]);
}

#[tokio::test]
async fn what_is_gone_is_made_again_and_what_changed_is_reverted_and_all_of_it_undone() {
    let Some(corner) = Corner::shared("restore") else { return };
    populate(&corner);
    corner.namespace.kubectl(&["expose", "deployment", "web", "--port", "80"]);
    corner.namespace.kubectl(&["create", "configmap", "gone", "--from-literal", "A=1"]);
    corner.namespace.kubectl(&["create", "serviceaccount", "worker"]);
    let directory = tempfile::tempdir().unwrap();
    let kinds = json!(["ConfigMap", "Secret", "PersistentVolumeClaim", "Service", "apps/Deployment", "ServiceAccount"]);
    let with = json!({ "key": key(directory.path(), KEY), "kinds": kinds });
    let path = keep(&corner, directory.path(), &with).await;
    let at_backup = written(&corner);
    let step = make(&corner, &path, &json!({ "key": with["key"] }));
    let same = step.prepare(&test("restore").forward()).await.unwrap();
    assert!(matches!(same, Prepared::Unchanged { .. }), "{same:?}");

    patch(&corner, "configmap/shop", r#"{"data":{"MODE":"off","MORE":"1"},"metadata":{"annotations":{"note":"x"}}}"#);
    patch(&corner, "secret/keys", r#"{"stringData":{"TOKEN":"hidden-other"}}"#);
    patch(&corner, "service/web", r#"{"spec":{"selector":{"app":"else"}}}"#);
    corner.namespace.kubectl(&["set", "image", "deployment/web", "web=shop/web:2"]);
    corner.namespace.kubectl(&["delete", "configmap/gone"]);
    corner.namespace.kubectl(&["create", "configmap", "since", "--from-literal", "B=1"]);
    let before = written(&corner);
    let address = corner.get("service/web").text("/spec/clusterIP").to_owned();

    let test = test("restore");
    let (undo, changes) = prepared(&step, &test).await;
    let lines = format!("{changes:#?}");
    for expected in [
        "objects of namespace",
        "left alone: configmap",
        "/since",
        "data.MODE: off -> on",
        "data.MORE: 1 -> none",
        "data.TOKEN: changed",
        "it is gone",
        "image: shop/web:2 -> shop/web:1",
    ] {
        assert!(lines.contains(expected), "{expected}: {lines}");
    }
    assert!(!lines.contains("hidden") && !serde_json::to_string(&undo).unwrap().contains("hidden"), "{lines}");
    assert!(!lines.contains("aGlkZGVu"), "{lines}");
    assert_eq!(written(&corner), before);
    // What was planned is what is done, whatever becomes of the file.
    fs::remove_file(&path).unwrap();

    let output = step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!((output.created.len(), output.changed.len()), (1, 4), "{output:?}");
    let mut after = written(&corner);
    let is_since = |item: &Value| item["metadata"]["name"] == "since";
    assert!(after.as_array().unwrap().iter().any(is_since), "what was made since is left alone");
    after.as_array_mut().unwrap().retain(|item| !is_since(item));
    assert_eq!(after, at_backup);
    assert_eq!(corner.get("service/web").text("/spec/clusterIP"), address);
    step.apply(&test.forward(), &undo).await.unwrap();

    step.rollback(&test.back(), &undo, Some(&output)).await.unwrap();
    assert_eq!(written(&corner), before);
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(written(&corner), before);
    tidy(&corner);
}

#[tokio::test]
async fn a_claim_that_is_made_again_binds() {
    let Some(corner) = Corner::shared("claim") else { return };
    populate(&corner);
    let directory = tempfile::tempdir().unwrap();
    let path = keep(&corner, directory.path(), &json!({ "kinds": ["PersistentVolumeClaim"] })).await;
    let text = fs::read_to_string(&path).unwrap();
    assert!(!text.contains("volumeName") && !text.contains("bind-completed"), "{text}");
    let name = corner.namespace.name.clone();
    corner.namespace.kubectl(&["delete", "persistentvolumeclaim/disk"]);
    // The volume waits for a person, who lets it go.
    patch(&corner, &format!("persistentvolume/{name}"), r#"{"spec":{"claimRef":null}}"#);
    let step = make(&corner, &path, &json!({}));
    let test = test("restore");
    let (undo, changes) = prepared(&step, &test).await;
    let change = changes.last().unwrap();
    assert_eq!(change.effect, Effect::Create);
    assert!(change.summary.as_deref().unwrap().contains("another volume") && change.undo_loses.is_some(), "{change:?}");
    step.apply(&test.forward(), &undo).await.unwrap();
    await_bound(&corner);
    step.apply(&test.forward(), &undo).await.unwrap();
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(corner.namespace.kubectl(&["get", "persistentvolumeclaims", "--output", "name"]), "");
    tidy(&corner);
}

#[tokio::test]
async fn what_cannot_be_changed_is_named_with_a_remedy_before_anything_changes() {
    let Some(corner) = Corner::shared("fixed") else { return };
    populate(&corner);
    patch(&corner, "configmap/shop", r#"{"immutable":true}"#);
    let directory = tempfile::tempdir().unwrap();
    let with = json!({ "key": key(directory.path(), KEY) });
    let path = keep(&corner, directory.path(), &with).await;
    corner.namespace.kubectl(&["delete", "configmap/shop", "persistentvolumeclaim/disk", "secret/keys"]);
    corner.namespace.apply(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: { name: shop }\ndata: { MODE: other }\nimmutable: true\n---\n\
         apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: { name: disk }\n\
         spec: { accessModes: [ReadWriteOnce], storageClassName: none, resources: { requests: { storage: 2Gi } } }\n",
    );
    let before = written(&corner);
    let step = make(&corner, &path, &with);
    let error = step.prepare(&test("restore").forward()).await.unwrap_err();
    assert_eq!(error.class(), Class::Permanent, "{error:?}");
    let hint = error.hint().unwrap();
    for expected in ["configmap", "/shop cannot be restored", "immutable", "/disk cannot be restored"] {
        assert!(error.message().contains(expected), "{expected}: {error:?}");
    }
    assert!(hint.contains("kubectl delete configmap/shop") && hint.contains("exclude: [configmap/shop]"), "{hint}");
    assert_eq!(written(&corner), before);

    // One that is not there, and whose place another one has.
    let services = json!({ "kinds": ["Service"] });
    corner.namespace.kubectl(&["create", "service", "nodeport", "web", "--tcp", "80"]);
    let kept_service = keep(&corner, directory.path(), &services).await;
    let taken = corner.get("service/web").number("/spec/ports/0/nodePort").to_string();
    corner.namespace.kubectl(&["delete", "service/web"]);
    corner.namespace.kubectl(&["create", "service", "nodeport", "other", "--tcp", "80", "--node-port", &taken]);
    let error = make(&corner, &kept_service, &json!({})).prepare(&test("restore").forward()).await.unwrap_err();
    assert!(error.message().contains("already allocated"), "{error:?}");
    assert!(error.hint().unwrap().contains("exclude: [service/web]"), "{error:?}");

    // Either remedy is one.
    corner.namespace.kubectl(&["delete", "configmap/shop"]);
    let mut with = with.clone();
    with["exclude"] = json!(["persistentvolumeclaim/disk"]);
    let step = make(&corner, &path, &with);
    let test = test("restore");
    let (undo, _) = prepared(&step, &test).await;
    let output = step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!((output.created.len(), output.changed.len()), (2, 0), "{output:?}");
    assert_eq!(corner.get("configmap/shop").at("/immutable"), &json!(true));
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert!(!corner.written("configmaps").contains("shop"));
    tidy(&corner);
}

#[tokio::test]
async fn somebody_elses_change_stops_it_and_is_kept() {
    let Some(corner) = Corner::shared("foreign") else { return };
    corner.namespace.kubectl(&["create", "configmap", "shop", "--from-literal", "MODE=on"]);
    corner.namespace.kubectl(&["create", "configmap", "gone", "--from-literal", "A=1"]);
    let directory = tempfile::tempdir().unwrap();
    let path = keep(&corner, directory.path(), &json!({ "kinds": ["ConfigMap"] })).await;
    patch(&corner, "configmap/shop", r#"{"data":{"MODE":"off","MORE":"1"}}"#);
    corner.namespace.kubectl(&["delete", "configmap/gone"]);
    let step = make(&corner, &path, &json!({}));
    let test = test("restore");
    let (undo, _) = prepared(&step, &test).await;

    // A key that is to go, another one's value, an object that is to be made: each is somebody's.
    for (theirs, back) in [
        (r#"{"data":{"MORE":"2"}}"#, r#"{"data":{"MORE":"1"}}"#),
        (r#"{"data":{"MODE":"x"}}"#, r#"{"data":{"MODE":"off"}}"#),
    ] {
        patch(&corner, "configmap/shop", theirs);
        let error = step.apply(&test.forward(), &undo).await.unwrap_err();
        assert!(error.as_conflict().is_some() && error.message().contains("/shop"), "{error:?}");
        step.rollback(&test.back(), &undo, None).await.unwrap_err();
        patch(&corner, "configmap/shop", back);
    }
    step.rollback(&test.back(), &undo, None).await.unwrap();
    corner.namespace.kubectl(&["create", "configmap", "gone", "--from-literal", "A=1"]);
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert!(error.as_conflict().is_some() && error.message().contains("/gone"), "{error:?}");
    corner.namespace.kubectl(&["delete", "configmap/gone"]);
    step.apply(&test.forward(), &undo).await.unwrap();

    // Beside what was restored, others may write.
    patch(&corner, "configmap/shop", r#"{"data":{"THEIRS":"1"}}"#);
    step.rollback(&test.back(), &undo, None).await.unwrap();
    let data = json!({ "MODE": "off", "MORE": "1", "THEIRS": "1" });
    assert_eq!(corner.get("configmap/shop").at("/data"), &data);
    step.apply(&test.forward(), &undo).await.unwrap();
    patch(&corner, "configmap/shop", r#"{"data":{"MODE":"x"}}"#);
    let winning = test.on_conflict(OnConflict::Overwrite);
    step.rollback(&winning.back(), &undo, None).await.unwrap();
    assert_eq!(corner.get("configmap/shop").at("/data"), &data);
}

#[tokio::test]
async fn a_wrong_backup_is_said_to_be_one() {
    let Some(corner) = Corner::shared("wrong") else { return };
    populate(&corner);
    let directory = tempfile::tempdir().unwrap();
    let with = json!({ "key": key(directory.path(), KEY) });
    let path = keep(&corner, directory.path(), &with).await;
    let other = key(directory.path(), &"ab".repeat(32));
    let damaged = directory.path().join("damaged");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&damaged, &bytes).unwrap();
    let manifest = directory.path().join("manifest.yaml");
    fs::write(&manifest, "apiVersion: v1\n").unwrap();
    let before = written(&corner);
    for (file, with, says, hint) in [
        (&path, json!({}), "is encrypted", "key"),
        (&path, json!({ "key": other }), "cannot be decrypted", "key"),
        (&damaged, with.clone(), "is damaged", "another backup"),
        (&manifest, with.clone(), "is no backup", "k8s.apply"),
        (&directory.path().join("none"), with.clone(), "cannot be read", "path"),
        (&path, json!({ "key": with["key"], "sha256": "0".repeat(64) }), "digest", "right one"),
        (&path, json!({ "key": with["key"], "namespace": "default" }), "is of namespace", "elsewhere"),
    ] {
        let error = make(&corner, file, &with).prepare(&test("restore").forward()).await.unwrap_err();
        assert_eq!(error.class(), Class::Permanent, "{error:?}");
        assert!(error.message().contains(says) && error.hint().unwrap().contains(hint), "{error:?}");
    }
    // As if of another cluster: the first line of one that is not encrypted can be written anew.
    let plain = keep(&corner, directory.path(), &json!({ "kinds": ["ConfigMap"] })).await;
    let text = fs::read_to_string(&plain).unwrap().replace("\"cluster\":\"", "\"cluster\":\"x");
    fs::write(&plain, text).unwrap();
    let error = make(&corner, &plain, &json!({})).prepare(&test("restore").forward()).await.unwrap_err();
    assert!(error.message().contains("is of xcluster") && error.hint().unwrap().contains("elsewhere"), "{error:?}");
    assert_eq!(written(&corner), before);

    let away = Corner::shared("away").unwrap();
    let step = make(&away, &plain, &json!({ "elsewhere": true }));
    let test = test("restore");
    let (undo, _) = prepared(&step, &test).await;
    step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!(away.get("configmap/shop").text("/data/MODE"), "on");
    step.rollback(&test.back(), &undo, None).await.unwrap();
    tidy(&corner);
}

#[tokio::test]
async fn a_backup_of_the_same_run_is_restored_by_a_later_step() {
    let Some(corner) = Corner::shared("chain") else { return };
    corner.namespace.kubectl(&["create", "configmap", "shop", "--from-literal", "MODE=on"]);
    let (kubeconfig, directory) = (corner.kubeconfig().display(), corner.directory());
    let (namespace, directory) = (&corner.namespace.name, directory.display());
    let document = format!(
        r#"
upgrade: shop
targets: {{ cluster: {{ uses: k8s, with: {{ kubeconfig: "{kubeconfig}", namespace: {namespace} }} }} }}
steps:
  - {{ id: keep, uses: k8s.backup, with: {{ target: cluster, to: "{directory}", kinds: [ConfigMap] }} }}
  - {{ id: change, uses: k8s.config, with: {{ target: cluster, config_maps: {{ shop: {{ MODE: "off" }} }}, workloads: [] }} }}
  - {{ id: restore, uses: k8s.restore, with: {{ target: cluster, backup: "${{steps.keep.output.path}}" }} }}
"#
    );
    let pipeline =
        parse(&document, "pipeline.yaml".as_ref(), "/".as_ref(), &LoadOptions::default(), &registry()).unwrap();
    let executor = Executor::new(Arc::new(MemoryJournal::new()));
    executor.plan(&pipeline).await.unwrap();
    assert_eq!(fs::read_dir(corner.directory()).unwrap().count(), 0, "a plan writes nothing");
    let report = executor.run(&pipeline, &RunOptions::default(), &Interrupt::new()).await.unwrap();
    assert_eq!(report.outcome, Outcome::Committed);
    assert_eq!(corner.get("configmap/shop").text("/data/MODE"), "on");
    assert_eq!(fs::read_dir(corner.directory()).unwrap().count(), 1);
}

#[tokio::test]
async fn mistakes_name_their_key() {
    let Some(corner) = Corner::shared("mistakes") else { return };
    for (with, key) in [
        (json!({ "sha256": "12" }), "sha256"),
        (json!({ "exclude": ["shop"] }), "exclude.0"),
        (json!({ "namespace": "a b" }), "namespace"),
    ] {
        let mut config = json!({ "target": "cluster", "backup": "x" });
        config.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
        let config: RestoreConfig = serde_json::from_value(config).unwrap();
        let error = Restore::from_config(config, &corner.build_context()).unwrap_err();
        assert_eq!(error.key.as_deref(), Some(key), "{error}");
    }
}
