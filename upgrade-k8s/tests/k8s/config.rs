//! `k8s.config` on a real control plane.

#![cfg(test)]

use serde_json::{Value, json};
use upgrade_core::secret::Secrets;
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_k8s::steps::{ConfigStep, ConfigStepConfig, ConfigUndo};

use crate::world::{Corner, set};

const KINDS: &str = "deployments,statefulsets,configmaps,secrets";

fn make(corner: &Corner, with: &Value) -> ConfigStep {
    let mut config = json!({ "target": "cluster" });
    config.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
    let config: ConfigStepConfig = serde_json::from_value(config).unwrap();
    ConfigStep::from_config(config, &corner.build_context()).unwrap()
}

async fn prepared(step: &ConfigStep, test: &TestContext) -> ConfigUndo {
    match step.prepare(&test.forward()).await.unwrap() {
        Prepared::Change { undo, .. } => undo,
        other => panic!("{other:?}"),
    }
}

/// `web` reads a ConfigMap, `db` a Secret, `other` none of them.
fn populate(corner: &Corner, more: &str) {
    let reading = |name: &str, image: &str, from: &str| {
        crate::world::deployment(name, image, 1)
            .replace("env: [{ name: MODE, value: old }]", &format!("envFrom: [{from}]"))
    };
    let data = "data: { MODE: old, KEEP: \"1\" }";
    corner.namespace.apply(&format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{ name: shop }}\n{data}\n{more}"));
    corner.namespace.kubectl(&["create", "secret", "generic", "keys", "--from-literal", "TOKEN=hidden-before"]);
    corner.namespace.apply(&reading("web", "shop/web:1", "{ configMapRef: { name: shop } }"));
    corner.namespace.apply(&reading("other", "shop/other:1", "{ configMapRef: { name: none, optional: true } }"));
    let db = set("StatefulSet", "db", "shop/db:1", "replicas: 1\n  serviceName: db")
        .replace("image: \"shop/db:1\"", "image: \"shop/db:1\", envFrom: [{ secretRef: { name: keys } }]");
    corner.namespace.apply(&db);
    for app in ["web", "other", "db"] {
        corner.await_pods(app, &format!("shop/{app}:1"), 1);
    }
}

fn generation(corner: &Corner, workload: &str) -> i64 {
    corner.get(workload).number("/metadata/generation")
}

#[tokio::test]
async fn what_is_read_changes_with_who_reads_it_and_goes_back_with_it() {
    let Some(corner) = Corner::shared("config") else { return };
    populate(&corner, "");
    let before = corner.written(KINDS);
    let token = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(token.path(), "hidden-after").unwrap();
    let page = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(page.path(), "a: 1\nb: 2\n").unwrap();
    let step = make(
        &corner,
        &json!({ "config_maps": { "shop": { "MODE": "new", "KEEP": null }, "made": { "A": "1" } },
            "files": { "shop": { "page.yaml": page.path() } }, "secrets": { "keys": { "TOKEN": { "file": token.path() } } } }),
    );
    let test = TestContext::new("config").secrets(Secrets::default());
    let Prepared::Change { undo, changes, .. } = step.prepare(&test.forward()).await.unwrap() else {
        panic!("a change")
    };
    let lines = format!("{changes:?}");
    for expected in ["MODE: old -> new", "deployment", "statefulset", "data.TOKEN: changed"] {
        assert!(lines.contains(expected), "{expected}: {lines}");
    }
    assert!(!lines.contains("hidden") && !serde_json::to_string(&undo).unwrap().contains("hidden"), "{lines}");
    let others = generation(&corner, "deployment/other");

    let output = step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!(output.workloads.len(), 2, "{output:?}");
    assert_eq!(corner.get("configmap/shop").at("/data"), &json!({ "MODE": "new", "page.yaml": "a: 1\nb: 2\n" }));
    assert_eq!(corner.get("secret/keys").text("/data/TOKEN"), "aGlkZGVuLWFmdGVy");
    assert_eq!(generation(&corner, "deployment/other"), others, "who reads none of it is left alone");
    corner.await_pods("web", "shop/web:1", 1);
    step.apply(&test.forward(), &undo).await.unwrap();
    let again = step.prepare(&TestContext::new("again").forward()).await.unwrap();
    assert!(matches!(again, Prepared::Unchanged { .. }), "{again:?}");

    step.rollback(&test.back(), &undo, Some(&output)).await.unwrap();
    corner.await_pods("web", "shop/web:1", 1);
    corner.await_pods("db", "shop/db:1", 1);
    assert_eq!(corner.written(KINDS), before);
    step.rollback(&test.back(), &undo, None).await.unwrap();
}

#[tokio::test]
async fn an_immutable_one_is_replaced_by_another_that_its_readers_are_led_to() {
    let Some(corner) = Corner::shared("fixed") else { return };
    populate(&corner, "immutable: true\n");
    let before = corner.written(KINDS);
    let step = make(&corner, &json!({ "config_maps": { "shop": { "MODE": "new" } } }));
    let test = TestContext::new("config");
    let undo = prepared(&step, &test).await;
    let output = step.apply(&test.forward(), &undo).await.unwrap();
    let name = &output.names["configmap/shop"];
    assert!(name.starts_with("shop-") && name.len() == 13, "{name}");
    let made = corner.get(&format!("configmap/{name}"));
    assert_eq!((made.text("/data/MODE"), made.text("/data/KEEP")), ("new", "1"));
    assert_eq!(made.at("/immutable"), &json!(true));
    let reads = "/spec/template/spec/containers/0/envFrom/0/configMapRef/name";
    assert_eq!(corner.get("deployment/web").text(reads), name);
    assert_eq!(corner.get("configmap/shop").text("/data/MODE"), "old");
    step.rollback(&test.back(), &undo, None).await.unwrap();
    corner.await_pods("web", "shop/web:1", 1);
    assert_eq!(corner.written(KINDS), before);
    let same = make(&corner, &json!({ "config_maps": { "shop": { "MODE": "old" } } }));
    let again = same.prepare(&TestContext::new("again").forward()).await.unwrap();
    assert!(matches!(again, Prepared::Unchanged { .. }), "{again:?}");
}

#[tokio::test]
async fn a_configuration_that_its_reader_does_not_bear_is_taken_back_with_it() {
    let Some(corner) = Corner::shared("bear") else { return };
    populate(&corner, "");
    let before = corner.written(KINDS);
    let named = json!(["deployment/web"]);
    let step =
        make(&corner, &json!({ "config_maps": { "shop": { "MODE": "new" } }, "workloads": named, "deadline": "3s" }));
    // What makes its pods fail is not theirs to say here: they never get room.
    corner.namespace.kubectl(&["create", "quota", "none", "--hard", "pods=3"]);
    let test = TestContext::new("config");
    let undo = prepared(&step, &test).await;
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert!(error.message().contains("deployment/web"), "{error:?}");
    corner.namespace.kubectl(&["delete", "quota", "none"]);
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(corner.written(KINDS), before);
}

#[tokio::test]
async fn mistakes_name_their_key() {
    let Some(corner) = Corner::shared("mistakes") else { return };
    for (with, key) in [
        (json!({}), "config_maps"),
        (json!({ "config_maps": { "a/b": { "A": "1" } } }), "config_maps"),
        (json!({ "config_maps": { "a": { "A": "1" } }, "files": { "a": { "A": "x" } } }), "files.a.A"),
    ] {
        let mut config: ConfigStepConfig = serde_json::from_value(with).unwrap();
        config.target = Some("cluster".into());
        let error = ConfigStep::from_config(config, &corner.build_context()).unwrap_err();
        assert_eq!(error.key.as_deref(), Some(key), "{error}");
    }
    let step = make(&corner, &json!({ "files": { "a": { "A": "/nowhere/file" } } }));
    let error = step.prepare(&TestContext::new("x").forward()).await.unwrap_err();
    assert!(error.message().contains("/nowhere/file"), "{error:?}");
}
