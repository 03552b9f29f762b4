//! `k8s.backup` on a real control plane.

#![cfg(test)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::{Value, json};
use upgrade_core::context::OnConflict;
use upgrade_core::error::Class;
use upgrade_core::secret::Secrets;
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_k8s::steps::{Backup, BackupConfig, BackupOutput, BackupUndo};

use crate::world::Corner;

/// A key of 64 hexadecimal digits.
pub(crate) const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

pub(crate) fn make(corner: &Corner, to: &Path, with: &Value) -> Backup {
    let mut config = json!({ "target": "cluster", "to": to });
    config.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
    let config: BackupConfig = serde_json::from_value(config).unwrap();
    Backup::from_config(config, &corner.build_context()).unwrap()
}

/// Writes a key, and returns what refers to it.
pub(crate) fn key(directory: &Path, digits: &str) -> Value {
    let path = directory.join(format!("{}.key", &digits[..2]));
    fs::write(&path, format!("{digits}\n")).unwrap();
    json!({ "file": path })
}

/// A call of a step that may read keys.
pub(crate) fn test(subject: &str) -> TestContext {
    TestContext::new(subject).secrets(Secrets::default())
}

/// Makes a backup, and returns what it says of itself.
pub(crate) async fn kept(step: &Backup, test: &TestContext) -> (BackupUndo, BackupOutput) {
    let Prepared::Change { undo, .. } = step.prepare(&test.forward()).await.unwrap() else { panic!("a change") };
    let output = step.apply(&test.forward(), &undo).await.unwrap();
    (undo, output)
}

/// A ConfigMap, a Secret, a claim that is bound, and a Deployment, which makes ReplicaSets.
pub(crate) fn populate(corner: &Corner) {
    let name = &corner.namespace.name;
    corner.namespace.apply(&format!(
        r#"
apiVersion: v1
kind: ConfigMap
metadata: {{ name: shop, labels: {{ app: shop }} }}
data: {{ MODE: "on", page.conf: "server {{\n  listen 80;\n}}\n" }}
---
apiVersion: v1
kind: Secret
metadata: {{ name: keys, labels: {{ app: shop }} }}
stringData: {{ TOKEN: hidden-token }}
---
apiVersion: v1
kind: PersistentVolume
metadata: {{ name: {name} }}
spec:
  capacity: {{ storage: 1Gi }}
  accessModes: [ReadWriteOnce]
  storageClassName: {name}
  persistentVolumeReclaimPolicy: Retain
  hostPath: {{ path: /nowhere }}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{ name: disk }}
spec: {{ accessModes: [ReadWriteOnce], storageClassName: {name}, resources: {{ requests: {{ storage: 1Gi }} }} }}
"#
    ));
    corner.deployment("web", "shop/web:1", 1);
    corner.await_pods("web", "shop/web:1", 1);
    await_bound(corner);
}

/// Waits until the claim has a volume.
pub(crate) fn await_bound(corner: &Corner) {
    let began = std::time::Instant::now();
    while corner.get("persistentvolumeclaim/disk").text("/status/phase") != "Bound" {
        assert!(began.elapsed() < std::time::Duration::from_secs(30), "{:?}", corner.get("persistentvolumeclaim/disk"));
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// Removes the volume, which is in no namespace.
pub(crate) fn tidy(corner: &Corner) {
    let name = &corner.namespace.name;
    corner.namespace.kubectl(&["delete", "persistentvolume", name, "--ignore-not-found", "--wait=false"]);
}

#[tokio::test]
async fn what_people_wrote_is_kept_and_nothing_of_it_is_shown() {
    let Some(corner) = Corner::shared("backup") else { return };
    populate(&corner);
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("made/for/it");
    let step = make(&corner, &to, &json!({ "key": key(directory.path(), KEY) }));
    let test = test("keep");
    let Prepared::Change { undo, changes } = step.prepare(&test.forward()).await.unwrap() else { panic!("a change") };
    let line = changes[0].summary.clone().unwrap();
    for expected in
        ["1 configmaps, 1 secrets, 1 persistentvolumeclaims", "encrypted", "by the cluster itself", "kube-root-ca.crt"]
    {
        assert!(line.contains(expected), "{expected}: {line}");
    }
    assert!(!to.exists());

    let output = step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!((output.objects, output.path.clone()), (3, undo.path.clone()));
    let file = fs::read(&output.path).unwrap();
    assert_eq!(output.bytes, file.len() as u64);
    assert_eq!(fs::metadata(&output.path).unwrap().permissions().mode() & 0o777, 0o600);
    let shown = String::from_utf8_lossy(&file);
    assert!(shown.starts_with("# k8s.backup {") && !shown.contains("MODE") && !shown.contains("aGlkZGVu"), "{shown}");
    assert_eq!(fs::read_dir(&to).unwrap().count(), 1, "nothing beside it");
    // A second call finds it.
    assert_eq!(step.apply(&test.forward(), &undo).await.unwrap(), output);
    assert_eq!(fs::read(&output.path).unwrap(), file);

    step.rollback(&test.back(), &undo, Some(&output)).await.unwrap();
    assert!(!directory.path().join("made").exists());
    step.rollback(&test.back(), &undo, None).await.unwrap();
    tidy(&corner);
}

#[tokio::test]
async fn one_without_secrets_is_what_kubectl_takes() {
    let Some(corner) = Corner::shared("plain") else { return };
    populate(&corner);
    let nasty = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "nasty", "labels": { "app": "shop" } },
        "data": { "a": "yes", "b": "12:30:45", "c": "0o17", "d": " lead and trail ", "e": "a\n\n", "f": "# no\n---\nb: c\n",
            "g": "tab\there \u{7f}\u{85}\u{feff}", "h": "word ".repeat(60), "i": "1_000", "j": "~", "k": "a\r\nb", "l": "é😀" } });
    corner.namespace.apply(&nasty.to_string());
    let directory = tempfile::tempdir().unwrap();
    let kinds = json!(["v1/ConfigMap", "deployments.apps", "replicasets", "pods"]);
    let step = make(&corner, &directory.path().join("kept.yaml"), &json!({ "kinds": kinds, "selector": "app" }));
    let (undo, output) = kept(&step, &test("keep")).await;
    // ReplicaSets and pods belong to the Deployment.
    assert_eq!((output.objects, &undo.path), (3, &directory.path().join("kept.yaml")));
    let text = fs::read_to_string(&output.path).unwrap();
    assert!(text.contains("listen 80;") && !text.contains("resourceVersion") && !text.contains("status:"), "{text}");
    let written = || serde_json::from_str::<Value>(&corner.written("configmaps,deployments")).unwrap();
    let before = written();
    corner.namespace.kubectl(&["delete", "configmap/shop", "configmap/nasty", "deployment/web"]);
    corner.namespace.kubectl(&["create", "--filename", output.path.to_str().unwrap()]);
    assert_eq!(written(), before);
    tidy(&corner);
}

#[tokio::test]
async fn old_ones_go_at_commit_and_a_wish_to_keep_it_is_heeded() {
    let Some(corner) = Corner::shared("old") else { return };
    corner.namespace.kubectl(&["create", "configmap", "shop", "--from-literal", "A=1"]);
    let directory = tempfile::tempdir().unwrap();
    let only = json!({ "kinds": ["ConfigMap"], "keep": 2, "on_rollback": "keep" });
    let step = make(&corner, directory.path(), &only);
    fs::write(directory.path().join("mine.yaml"), "").unwrap();
    let mut all = Vec::new();
    for _ in 0..3 {
        let test = test("keep");
        let (undo, output) = kept(&step, &test).await;
        step.commit(&test.commit(), &undo).await.unwrap();
        step.commit(&test.commit(), &undo).await.unwrap();
        all.push((test, undo, output.path));
    }
    let there: Vec<_> = all.iter().map(|(_, _, path)| path.exists()).collect();
    assert_eq!(there, [false, true, true]);
    assert!(directory.path().join("mine.yaml").exists());
    let (test, undo, path) = &all[2];
    step.rollback(&test.back(), undo, None).await.unwrap();
    assert!(path.exists());
}

#[tokio::test]
async fn a_file_that_this_run_did_not_make_stays() {
    let Some(corner) = Corner::shared("theirs") else { return };
    corner.namespace.kubectl(&["create", "configmap", "shop", "--from-literal", "A=1"]);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kept.yaml");
    let step = make(&corner, &path, &json!({ "kinds": ["ConfigMap"] }));
    let first = test("keep");
    let Prepared::Change { undo, .. } = step.prepare(&first.forward()).await.unwrap() else { panic!("a change") };
    let other = test("keep");
    let (_, output) = kept(&step, &other).await;
    let error = step.apply(&first.forward(), &undo).await.unwrap_err();
    assert!(error.as_conflict().is_some(), "{error:?}");
    let error = step.rollback(&first.back(), &undo, None).await.unwrap_err();
    assert!(error.as_conflict().is_some() && path.exists(), "{error:?}");
    let error = step.prepare(&test("keep").forward()).await.unwrap_err();
    assert!(error.message().contains("is there already"), "{error:?}");
    // One that somebody wrote to is nobody's.
    fs::write(&path, fs::read_to_string(&output.path).unwrap() + "# mine\n").unwrap();
    let error = step.rollback(&other.back(), &undo, None).await.unwrap_err();
    assert!(error.as_conflict().unwrap().present.contains("damaged"), "{error:?}");
    let winning = other.on_conflict(OnConflict::Overwrite);
    step.rollback(&winning.back(), &undo, None).await.unwrap();
    assert!(!path.exists());
}

#[tokio::test]
async fn what_cannot_be_kept_is_said_before_anything_is_written() {
    let Some(corner) = Corner::shared("cannot") else { return };
    let directory = tempfile::tempdir().unwrap();
    let bad = key(directory.path(), "no key");
    for (with, says, hint) in [
        (json!({ "kinds": ["Widget"] }), "no kind Widget", "api-resources"),
        (json!({ "kinds": ["deployments"] }), "no object of namespace", "selector"),
        (json!({ "key": bad }), "cannot be used", "openssl"),
        (json!({ "key": { "file": "/nowhere/key" } }), "/nowhere/key", "readable"),
        (json!({ "kinds": ["ConfigMap"], "selector": "a=(" }), "listing configmaps", "correct"),
        (json!({ "kinds": ["ConfigMap"], "free": "900TiB" }), "free", "file system"),
    ] {
        let mut config = json!({ "target": "cluster", "to": directory.path().join("new") });
        config.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
        let config: BackupConfig = serde_json::from_value(config).unwrap();
        let error = match Backup::from_config(config, &corner.build_context()) {
            Ok(step) => {
                if says == "free" {
                    corner.namespace.kubectl(&["create", "configmap", "shop", "--from-literal", "A=1"]);
                }
                step.prepare(&test("keep").forward()).await.unwrap_err()
            }
            Err(error) => panic!("{error}"),
        };
        assert_eq!(error.class(), Class::Permanent, "{error:?}");
        assert!(error.message().contains(says) && error.hint().unwrap().contains(hint), "{error:?}");
        assert!(!directory.path().join("new").exists());
    }
    let later = make(&corner, directory.path(), &json!({ "kinds": ["deployments"] }));
    let planned = later.prepare(&TestContext::new("keep").dry_run().forward()).await.unwrap();
    assert!(matches!(planned, Prepared::Change { .. }), "an earlier step may make them: {planned:?}");
}

#[tokio::test]
async fn mistakes_name_their_key() {
    let Some(corner) = Corner::shared("mistakes") else { return };
    for (with, key) in [
        (json!({}), "key"),
        (json!({ "kinds": ["configmap", "v1/Secret"] }), "key"),
        (json!({ "kinds": [] }), "kinds"),
        (json!({ "kinds": ["ConfigMap"], "exclude": ["shop"] }), "exclude.0"),
        (json!({ "kinds": ["ConfigMap"], "to": "a.yaml", "keep": 2 }), "keep"),
        (json!({ "kinds": ["ConfigMap"], "to": "a.yaml.sealed" }), "to"),
        (json!({ "to": "a.yaml", "key": { "env": "KEY" } }), "to"),
        (json!({ "kinds": ["ConfigMap"], "namespace": "a/b" }), "namespace"),
    ] {
        let mut config = json!({ "target": "cluster", "to": "backups" });
        config.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
        let config: BackupConfig = serde_json::from_value(config).unwrap();
        let error = Backup::from_config(config, &corner.build_context()).unwrap_err();
        assert_eq!(error.key.as_deref(), Some(key), "{error}");
        assert!(error.hint.is_some(), "{error}");
    }
}
