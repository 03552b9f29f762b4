//! `k8s.apis` on a real control plane of 1.20, which serves what later ones have removed.

#![cfg(test)]

use serde_json::json;
use upgrade_core::testkit::TestContext;
use upgrade_core::verdict::Status;

use super::{ask, table, wrong};
use crate::world::{Corner, registry};

const KIND: &str = "k8s.apis";

const INGRESS: &str = "apiVersion: extensions/v1beta1\nkind: Ingress\nmetadata: { name: old }\n\
                       spec: { backend: { serviceName: web, servicePort: 80 } }\n";
const NEW: &str = "apiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: { name: old }\n\
                   spec: { defaultBackend: { service: { name: web, port: { number: 80 } } } }\n";
const CRON: &str = "apiVersion: batch/v1beta1\nkind: CronJob\nmetadata: { name: nightly }\n\
                    spec: { schedule: '0 0 1 1 *', suspend: true, jobTemplate: { spec: { template: { spec: {\n\
                    restartPolicy: Never, containers: [{ name: c, image: 'x:done' }] } } } } }\n";

#[tokio::test]
async fn objects_are_named_with_who_writes_them() {
    let Some(corner) = Corner::shared("apis") else { return };
    let namespace = corner.namespace.name.clone();
    let asked = |to: &str| json!({ "to": to, "namespace": namespace });
    corner.namespace.apply(INGRESS);
    corner.namespace.apply(CRON);
    corner.namespace.kubectl(&["create", "pdb", "web", "--selector", "app=web", "--min-available", "1"]);
    let early = ask(&corner, KIND, &asked("1.21")).await;
    assert!(early.measurements["objects"] == 0.0 && early.status != Status::Fail, "{early:?}");
    let verdict = ask(&corner, KIND, &asked("1.25")).await;
    assert_eq!(verdict.status, Status::Fail, "{verdict:?}");
    assert_eq!(verdict.facts["metrics"], "read");
    for part in [
        format!(
            "ingress {namespace}/old (applied by kubectl): extensions/v1beta1 Ingress is gone in 1.22: write networking.k8s.io/v1"
        ),
        format!("cronjob {namespace}/nightly (applied by kubectl): batch/v1beta1 CronJob is gone in 1.25"),
        format!("poddisruptionbudget {namespace}/web (written by kubectl"),
    ] {
        assert!(verdict.message.contains(&part), "{part}: {verdict:?}");
    }
    corner.namespace.apply(NEW);
    let after = ask(&corner, KIND, &asked("1.22")).await;
    assert!(!after.message.contains(&format!("{namespace}/old")), "{after:?}");
    // What was requested is remembered by the API server.
    assert!(after.measurements["requested"] >= 1.0, "{after:?}");
    let next = ask(&corner, KIND, &json!({ "namespace": namespace })).await;
    assert_eq!(next.facts["to"], "1.21", "the next minor version of 1.20");
}

#[tokio::test]
async fn manifests_are_read_without_a_cluster() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("web.yaml");
    std::fs::write(&path, format!("apiVersion: v1\nkind: Service\nmetadata: {{ name: web }}\n---\n{CRON}")).unwrap();
    let with = |to: &str| json!({ "to": to, "objects": false, "manifests": [directory.path()] });
    let cx = upgrade_core::registry::BuildContext::new("/");
    for (to, status) in [("1.24", Status::Pass), ("v1.25.3", Status::Fail)] {
        let check = registry().make_check(KIND, with(to), &cx).unwrap();
        let verdict = check.check(&TestContext::new("check").forward()).await.unwrap();
        assert_eq!(verdict.status, status, "{verdict:?}");
        if status == Status::Fail {
            let said = format!(
                "{}, object 2 (nightly): batch/v1beta1 CronJob is gone in 1.25: write batch/v1",
                path.display()
            );
            assert!(verdict.message.contains(&said) && verdict.hint.is_some(), "{verdict:?}");
        }
    }
}

#[tokio::test]
async fn a_new_cluster_of_new_manifests_passes() {
    let Some(corner) = Corner::shared("apis-new") else { return };
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("new.yaml"), NEW).unwrap();
    let rows = [(json!({ "objects": false, "manifests": [directory.path()] }), Status::Pass, "gone in 1.21")];
    table(&corner, KIND, &rows).await;
}

#[test]
fn what_is_no_version_is_refused() {
    wrong(
        KIND,
        &[
            (json!({ "to": "next" }), "to"),
            (json!({ "to": "2.0" }), "to"),
            (json!({ "objects": false }), "manifests"),
            (json!({ "namespace": "a/b" }), "namespace"),
        ],
    );
}
