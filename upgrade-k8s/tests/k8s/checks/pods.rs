//! `k8s.pods` on a real control plane.

#![cfg(test)]

use serde_json::json;
use upgrade_core::verdict::Status;

use super::{ask, table, wrong};
use crate::world::{Corner, deployment};

const KIND: &str = "k8s.pods";

#[tokio::test]
async fn pods_are_found_by_their_labels_and_asked_how_they_are() {
    let Some(corner) = Corner::shared("pods") else { return };
    corner.deployment("web", "shop/web:1", 2);
    corner.namespace.apply(&deployment("sick", "shop/sick:crash", 1));
    corner.namespace.kubectl(&["create", "job", "once", "--image", "shop/once:done"]);
    corner.await_pods("web", "shop/web:1", 2);
    let began = std::time::Instant::now();
    while ask(&corner, KIND, &json!({ "selector": "app=sick" })).await.measurements["restarts"] < 1.0
        || corner.get("job/once").number("/status/succeeded") < 1
    {
        assert!(began.elapsed().as_secs() < 30, "it crashes, and the Job ends");
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    let rows = [
        (json!({ "selector": "app=web", "restarts": 0 }), Status::Pass, "2 pods"),
        (json!({ "selector": "app in (web, other)", "at_least": 3 }), Status::Fail, "there are 2, 3 is the least"),
        (json!({ "selector": "app=sick" }), Status::Fail, "CrashLoopBackOff"),
        (json!({ "selector": "app=sick", "not_ready": 1, "restarts": 0 }), Status::Fail, "started again 1 times"),
        (json!({ "not_ready": 1 }), Status::Pass, "3 pods"),
        (json!({ "selector": "app=none" }), Status::Fail, "there are 0"),
        (json!({ "selector": "app=none", "at_least": 0 }), Status::Pass, "0 pods"),
    ];
    table(&corner, KIND, &rows).await;
}

#[test]
fn a_namespace_that_is_none_is_refused() {
    wrong(KIND, &[(json!({ "namespace": "a/b" }), "namespace")]);
}
