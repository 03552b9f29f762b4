//! `k8s.workload` on a real control plane.

#![cfg(test)]

use std::time::{Duration, Instant};

use serde_json::json;
use upgrade_core::verdict::Status;

use super::{ask, table, wrong};
use crate::world::{Corner, set};

const KIND: &str = "k8s.workload";

#[tokio::test]
async fn workloads_are_asked_for_their_rollout_pods_and_images() {
    let Some(corner) = Corner::shared("healthy") else { return };
    corner.deployment("web", "shop/web:1", 2);
    corner.namespace.apply(&set("StatefulSet", "db", "shop/db:1", "replicas: 1\n  serviceName: db"));
    corner.namespace.apply(&set("DaemonSet", "agent", "shop/agent:1", ""));
    corner.deployment("none", "shop/none:1", 0);
    corner.await_pods("web", "shop/web:1", 2);
    corner.await_pods("db", "shop/db:1", 1);
    corner.await_pods("agent", "shop/agent:1", 3);
    std::thread::sleep(Duration::from_secs(1));
    let all = json!(["deployment/web", "statefulset/db", "daemonset/agent"]);
    let verdict = ask(&corner, KIND, &json!({ "workloads": all, "restarts": 0 })).await;
    assert_eq!(verdict.status, Status::Pass, "{verdict:?}");
    assert_eq!((verdict.measurements["ready"], verdict.measurements["wanted"]), (6.0, 6.0));
    assert_eq!(verdict.facts["pods"], "deployment/web 2/2, statefulset/db 1/1, daemonset/agent 3/3");
    let web = json!(["deployment/web"]);
    let rows = [
        (json!({ "workloads": web, "images": { "web": "shop/web:1" } }), Status::Pass, "deployment/web 2/2"),
        (
            json!({ "workloads": web, "images": { "web": "shop/web:2" } }),
            Status::Fail,
            "is of shop/web:1, not of shop/web:2",
        ),
        (json!({ "workloads": web, "images": { "wbe": "x" } }), Status::Fail, "no workload has a container wbe"),
        (json!({ "workloads": web, "ready": 3 }), Status::Fail, "2 pods are ready, 3 is the least"),
        (json!({ "workloads": ["deployment/wbe"] }), Status::Fail, "deployment/wbe: it does not exist"),
        (json!({ "workloads": ["deployment/none"] }), Status::Warn, "shall have no pods"),
        (json!({ "workloads": ["deployment/none"], "ready": 0 }), Status::Pass, "deployment/none 0/0"),
    ];
    table(&corner, KIND, &rows).await;
}

#[tokio::test]
async fn a_rollout_that_does_not_get_on_is_named_with_its_cause() {
    let Some(corner) = Corner::shared("ill") else { return };
    corner.deployment("web", "shop/web:1", 2);
    corner.await_pods("web", "shop/web:1", 2);
    corner.namespace.kubectl(&["set", "image", "deployment/web", "web=shop/web:crash"]);
    let web = json!(["deployment/web"]);
    let began = Instant::now();
    let verdict = loop {
        let verdict = ask(&corner, KIND, &json!({ "workloads": web, "restarts": 0 })).await;
        if verdict.message.contains("started again") {
            break verdict;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "{verdict:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    assert_eq!(verdict.status, Status::Fail);
    assert!(verdict.message.contains("not rolled out") && verdict.message.contains("CrashLoopBackOff"), "{verdict:?}");
    // What a guard asks for while a rollout goes on.
    let rows = [
        (json!({ "workloads": web, "ready": 2 }), Status::Pass, "2/2"),
        (json!({ "workloads": web, "ready": 2, "rolled_out": true }), Status::Fail, "not rolled out"),
    ];
    table(&corner, KIND, &rows).await;
}

#[test]
fn what_asks_for_nothing_is_refused() {
    wrong(
        KIND,
        &[
            (json!({ "workloads": [] }), "workloads"),
            (json!({ "workloads": ["deployment/web"], "namespace": "" }), "namespace"),
        ],
    );
}
