//! `k8s.budget` on a real control plane.

#![cfg(test)]

use std::time::{Duration, Instant};

use serde_json::json;
use upgrade_core::verdict::Status;

use super::{ask, table, wrong};
use crate::world::Corner;

const KIND: &str = "k8s.budget";

#[tokio::test]
async fn a_budget_that_allows_no_disruption_is_named() {
    let Some(corner) = Corner::shared("budget") else { return };
    let nothing = ask(&corner, KIND, &json!({})).await;
    assert_eq!((nothing.status, nothing.measurements["budgets"]), (Status::Pass, 0.0), "{nothing:?}");
    for (app, least) in [("loose", "1"), ("tight", "2"), ("empty", "1")] {
        let replicas = if app == "empty" { 0 } else { 2 };
        corner.deployment(app, "shop/web:1", replicas);
        let selector = format!("app={app}");
        corner.namespace.kubectl(&["create", "pdb", app, "--selector", &selector, "--min-available", least]);
    }
    corner.await_pods("loose", "shop/web:1", 2);
    corner.await_pods("tight", "shop/web:1", 2);
    let began = Instant::now();
    while ask(&corner, KIND, &json!({ "budgets": ["loose", "empty"] })).await.status != Status::Pass {
        assert!(began.elapsed() < Duration::from_secs(30), "its controller looks at it");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let rows = [
        (json!({}), Status::Fail, "tight allows no disruption: all of its 2 pods must stay"),
        (json!({ "namespace": "*" }), Status::Fail, "tight allows no disruption"),
        (json!({ "budgets": ["loose", "none"] }), Status::Fail, "there is no PodDisruptionBudget none"),
    ];
    table(&corner, KIND, &rows).await;
    corner.namespace.kubectl(&["set", "image", "deployment/loose", "web=shop/web:unready"]);
    corner.namespace.kubectl(&["delete", "pods", "--selector", "app=loose", "--wait=false"]);
    loop {
        let verdict = ask(&corner, KIND, &json!({ "budgets": ["loose"] })).await;
        if verdict.status == Status::Fail && verdict.message.contains("are healthy, 1 must be") {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{verdict:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[test]
fn names_that_cannot_be_are_refused() {
    wrong(KIND, &[(json!({ "namespace": "a/b" }), "namespace"), (json!({ "budgets": [""] }), "budgets.0")]);
}
