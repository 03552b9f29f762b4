//! `k8s.capacity` on a real control plane, whose nodes say that they have 32 processors each.

#![cfg(test)]

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use upgrade_core::verdict::Status;

use super::{answer, ask, table, wrong};
use crate::world::{Corner, deployment};

const KIND: &str = "k8s.capacity";

fn asking(name: &str, replicas: u32, cpu: &str, surge: &str) -> String {
    let text = deployment(name, "shop/web:1", replicas);
    let text =
        text.replace("  template:", &format!("  strategy: {{ rollingUpdate: {{ maxSurge: {surge} }} }}\n  template:"));
    text.replace("env:", &format!("resources: {{ requests: {{ cpu: {cpu}, memory: 64Mi }} }}, env:"))
}

#[tokio::test]
async fn a_surge_must_find_room_on_the_nodes() {
    let Some(corner) = Corner::shared("capacity") else { return };
    corner.namespace.apply(&asking("web", 4, "100m", "30%"));
    corner.namespace.apply(&asking("giant", 0, "33", "1"));
    let web = json!({ "workloads": ["deployment/web"] });
    let verdict = ask(&corner, KIND, &web).await;
    assert_eq!(verdict.status, Status::Pass, "{verdict:?}");
    let figure = |name: &str| verdict.measurements[name];
    assert_eq!((figure("needed_pods"), figure("needed_cpu_cores")), (2.0, 0.2), "a share is rounded up");
    assert_eq!(figure("needed_memory_bytes"), 128.0 * 1024.0 * 1024.0);
    assert!(figure("free_cpu_cores") > 1.0 && figure("free_pods") > 2.0, "{verdict:?}");

    let none = ask(&corner, KIND, &json!({ "workloads": ["deployment/giant"] })).await;
    assert!(none.status == Status::Pass && none.measurements["needed_pods"] == 0.0, "no replicas, no surge: {none:?}");
    corner.namespace.kubectl(&["scale", "deployment/giant", "--replicas=1"]);
    let rows = [
        (json!({ "workloads": ["deployment/giant"] }), Status::Fail, "cpu: 33 a pod"),
        (json!({ "workloads": ["deployment/web", "deployment/none"] }), Status::Fail, "deployment/none does not exist"),
        (json!({ "pods": 2, "requests": { "cpu": 1, "memory": "1Gi" } }), Status::Pass, "2 more of pods"),
        (json!({ "pods": 1, "requests": { "memory": "257Gi" } }), Status::Fail, "memory: 257Gi a pod"),
        (json!({ "pods": 100_000 }), Status::Fail, "pods: 1 a pod, 0 is the most"),
        (
            json!({ "pods": 1, "requests": { "nvidia.com/gpu": 1 } }),
            Status::Fail,
            "nvidia.com/gpu: 1 a pod, 0 is the most",
        ),
    ];
    table(&corner, KIND, &rows).await;
}

/// The scheduler is the judge: what the check says fits is placed, and what it says does not stays pending.
#[tokio::test]
async fn the_scheduler_agrees() {
    let Some(corner) = Corner::shared("agrees") else { return };
    let patch = |what: Value| {
        corner.namespace.kubectl(&["patch", "deployment/web", "--type=merge", "--patch", &what.to_string()])
    };
    corner.namespace.apply(&asking("web", 1, "1", "1"));
    for (spec, fits, says) in [
        (json!({ "nodeSelector": { "kubernetes.io/os": "linux" } }), true, "room for 1 more"),
        (json!({ "nodeSelector": { "kubernetes.io/os": "plan9" } }), false, "nodes without kubernetes.io/os=plan9"),
    ] {
        patch(json!({ "spec": { "template": { "spec": spec } } }));
        let verdict = ask(&corner, KIND, &json!({ "workloads": ["deployment/web"] })).await;
        assert_eq!(verdict.status == Status::Pass, fits, "{verdict:?}");
        assert!(verdict.message.contains(says), "{verdict:?}");
        let began = Instant::now();
        loop {
            let format = "jsonpath={range .items[*]}{.spec.nodeSelector}{.spec.nodeName}{.status.conditions[*].reason}{'\\n'}{end}";
            let pods = corner.namespace.kubectl(&["get", "pods", "--output", format]);
            let system = spec["nodeSelector"]["kubernetes.io/os"].as_str().unwrap();
            let own = pods.lines().find(|line| line.contains(system)).unwrap_or_default();
            if own.contains("}node") || own.contains("Unschedulable") {
                assert_eq!(!own.contains("Unschedulable"), fits, "{pods}");
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "{pods}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    patch(json!({ "spec": { "template": { "spec": { "nodeSelector": null, "affinity": { "podAntiAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": [
            { "topologyKey": "kubernetes.io/hostname", "labelSelector": { "matchLabels": { "app": "web" } } }] } } } } } }));
    let verdict = ask(&corner, KIND, &json!({ "workloads": ["deployment/web"] })).await;
    assert_eq!(verdict.status, Status::Warn, "{verdict:?}");
    assert!(verdict.message.contains("not pod anti-affinity of deployment/web"), "{verdict:?}");
}

#[tokio::test]
async fn a_quota_must_leave_room_too() {
    let Some(corner) = Corner::shared("quota") else { return };
    corner.namespace.apply(
        "apiVersion: v1\nkind: LimitRange\nmetadata: { name: given }\n\
         spec: { limits: [{ type: Container, default: { memory: 256Mi }, defaultRequest: { memory: 128Mi } }] }\n",
    );
    corner.namespace.apply(&asking("web", 3, "100m", "2").replace("cpu: 100m, memory: 64Mi", "cpu: 100m"));
    corner.await_pods("web", "shop/web:1", 3);
    corner.namespace.kubectl(&[
        "create",
        "quota",
        "most",
        "--hard=pods=5,requests.cpu=400m,requests.memory=1Gi,limits.memory=1Gi",
    ]);
    let began = Instant::now();
    let verdict = loop {
        let verdict = ask(&corner, KIND, &json!({ "workloads": ["deployment/web"] })).await;
        if verdict.status == Status::Fail {
            break verdict;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "its controller counts: {verdict:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    for part in [
        "the quota most leaves 0.1 of requests.cpu, 0.2 more is needed, 0.1 too little",
        "leaves 256Mi of limits.memory, 512Mi more is needed",
    ] {
        assert!(verdict.message.contains(part), "{part}: {verdict:?}");
    }
    assert!(!verdict.message.contains("requests.memory") && !verdict.message.contains("of pods"), "{verdict:?}");
    let one = json!({ "pods": 1, "requests": { "cpu": "100m" } });
    assert_eq!(ask(&corner, KIND, &one).await.status, Status::Pass);
}

#[tokio::test]
async fn who_may_not_look_knows_nothing() {
    let Some(corner) = Corner::shared("looks") else { return };
    let Some(stranger) = corner.namespace.cluster().kubeconfig_of("stranger") else { return };
    let error = answer(&stranger, &corner.namespace.name, KIND, &json!({ "pods": 1 })).await.unwrap_err();
    assert!(error.hint().is_some() && error.message().contains("pods"), "{error:?}");
}

#[test]
fn what_needs_no_room_is_refused() {
    wrong(
        KIND,
        &[
            (json!({}), "workloads"),
            (json!({ "requests": { "cpu": 1 }, "workloads": ["deployment/web"] }), "pods"),
            (json!({ "pods": 1, "requests": { "cpu": "-1" } }), "requests.cpu"),
            (json!({ "pods": 1, "namespace": "a/b" }), "namespace"),
        ],
    );
}
