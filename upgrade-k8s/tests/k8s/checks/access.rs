//! `k8s.access` on a real control plane.

#![cfg(test)]

use serde_json::json;
use upgrade_core::verdict::Status;

use super::{answer, ask, table, wrong};
use crate::world::Corner;

const KIND: &str = "k8s.access";

#[tokio::test]
async fn what_is_missing_is_named_with_the_role_that_would_grant_it() {
    let Some(corner) = Corner::shared("access") else { return };
    let namespace = corner.namespace.name.clone();
    let rights = json!([
        { "verbs": ["get", "patch"], "resource": "deployments" },
        { "verbs": ["get"], "resource": "pods/log", "name": "web-1" },
        { "verbs": ["list"], "resource": "nodes" },
        { "verbs": ["list"], "resource": "pods", "namespace": "*" },
    ]);
    let all = json!({ "rights": rights });
    let verdict = ask(&corner, KIND, &all).await;
    assert_eq!((verdict.status, verdict.measurements["asked"]), (Status::Pass, 5.0), "{verdict:?}");

    let Some(stranger) = corner.namespace.cluster().kubeconfig_of("stranger") else { return };
    let verdict = answer(&stranger, &namespace, KIND, &all).await.unwrap();
    assert_eq!((verdict.status, verdict.measurements["denied"]), (Status::Fail, 5.0), "{verdict:?}");
    for part in ["get, patch of deployments in namespace", "get of pods/log web-1", "list of nodes in the cluster"] {
        assert!(verdict.message.contains(part), "{part}: {verdict:?}");
    }
    let hint = verdict.hint.unwrap();
    for part in ["a Role in namespace", "apiGroups: [\"apps\"], resources: [\"deployments\"], verbs: [get, patch]"] {
        assert!(hint.contains(part), "{part}: {hint}");
    }
    assert!(hint.contains("resourceNames: [\"web-1\"]") && hint.contains("a ClusterRole with"), "{hint}");

    // What the hint says, given word by word, is enough.
    let start = hint.find("a Role in namespace").unwrap();
    let rules = hint[start..].split('`').nth(1).unwrap();
    let role = "apiVersion: rbac.authorization.k8s.io/v1\nkind: Role\nmetadata: { name: granted }\n";
    corner.namespace.apply(&format!("{role}{rules}\n"));
    corner.namespace.kubectl(&["create", "rolebinding", "granted", "--role", "granted", "--user", "stranger"]);
    let began = std::time::Instant::now();
    loop {
        let granted = json!({ "rights": [rights[0], rights[1]] });
        let verdict = answer(&stranger, &namespace, KIND, &granted).await.unwrap();
        if verdict.status == Status::Pass {
            break;
        }
        assert!(began.elapsed().as_secs() < 10, "{verdict:?}");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn what_the_cluster_does_not_have_is_said() {
    let Some(corner) = Corner::shared("unknown") else { return };
    let rows = [(
        json!({ "rights": [{ "verbs": ["get"], "resource": "rockets.example.com" }] }),
        Status::Fail,
        "the cluster has no rockets.example.com",
    )];
    table(&corner, KIND, &rows).await;
}

#[test]
fn what_asks_for_nothing_is_refused() {
    wrong(
        KIND,
        &[
            (json!({ "rights": [] }), "rights"),
            (json!({ "rights": [{ "verbs": [], "resource": "pods" }] }), "rights.0.verbs"),
        ],
    );
}
