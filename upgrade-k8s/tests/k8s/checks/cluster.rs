//! `k8s.cluster` on real control planes.

#![cfg(test)]

use serde_json::json;
use upgrade_core::error::Class;
use upgrade_core::verdict::Status;
use upgrade_testbed::kubernetes;

use super::{answer, ask, table, wrong};
use crate::world::Corner;

const KIND: &str = "k8s.cluster";

#[tokio::test]
async fn a_cluster_is_asked_for_its_version_and_its_nodes() {
    let Some(corner) = Corner::shared("version") else { return };
    let verdict = ask(&corner, KIND, &json!({})).await;
    assert_eq!(verdict.status, Status::Pass, "{verdict:?}");
    assert!(verdict.measurements["ready"] >= 1.0 && verdict.facts["version"].starts_with('v'), "{verdict:?}");
    let rows = [
        (json!({ "version": ">=1.20", "nodes": 1 }), Status::Pass, "nodes are ready"),
        (json!({ "version": ">=99" }), Status::Fail, "not >=99"),
        (json!({ "nodes": 1000 }), Status::Fail, "1000 is the least"),
    ];
    table(&corner, KIND, &rows).await;
    let Some(stranger) = corner.namespace.cluster().kubeconfig_of("stranger") else { return };
    let error = answer(&stranger, &corner.namespace.name, KIND, &json!({})).await.unwrap_err();
    assert_eq!(error.class(), Class::Permanent);
    let verdict = answer(&stranger, &corner.namespace.name, KIND, &json!({ "nodes": 0 })).await.unwrap();
    assert_eq!(verdict.status, Status::Pass, "who asks nothing of nodes needs no right to read them");
}

#[tokio::test]
async fn nodes_that_are_not_ready_or_of_another_age_are_named() {
    let Some(own) = kubernetes::own() else { return };
    let node = |name: &str, version: &str, ready: &str| {
        let manifest = format!(
            "apiVersion: v1\nkind: Node\nmetadata: {{ name: {name} }}\nstatus: {{ \
             nodeInfo: {{ kubeletVersion: {version}, architecture: '', bootID: '', containerRuntimeVersion: '', \
             kernelVersion: '', kubeProxyVersion: '', machineID: '', operatingSystem: '', osImage: '', systemUUID: '' }}, \
             conditions: [{{ type: Ready, status: '{ready}' }}] }}\n"
        );
        own.cluster().apply("default", &manifest);
    };
    let ask = async |with: serde_json::Value| {
        answer(own.cluster().kubeconfig(), "default", KIND, &with).await.unwrap_or_else(|error| panic!("{error:?}"))
    };
    assert_eq!(ask(json!({ "nodes": 3 })).await.status, Status::Pass);
    own.cluster().kubectl(["cordon", "node1"]);
    let verdict = ask(json!({})).await;
    assert!(verdict.status == Status::Warn && verdict.message.contains("cordoned: node1"), "{verdict:?}");
    node("old", "v1.16.9", "True");
    node("new", "v1.21.0", "True");
    node("down", "v1.20.2", "False");
    let verdict = ask(json!({})).await;
    assert_eq!(verdict.status, Status::Fail);
    for part in ["not ready: down", "old (v1.16.9)", "newer than the API server (v1.20.2): new (v1.21.0)"] {
        assert!(verdict.message.contains(part), "{part}: {verdict:?}");
    }
    let verdict = ask(json!({ "nodes": 3, "skew": 4 })).await;
    assert!(!verdict.message.contains("old") && !verdict.message.contains("down"), "{verdict:?}");
}

#[test]
fn a_range_that_is_none_is_refused() {
    wrong(KIND, &[(json!({ "version": "new" }), "version")]);
}
